"""The commands; pip installs this folder as `blipds.launch` (setup.cfg)."""
