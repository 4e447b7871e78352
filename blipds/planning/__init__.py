"""Before a run: what it needs of memory and network, and whether the machines are ready for it."""
