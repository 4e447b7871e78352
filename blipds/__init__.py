"""blipds: finetune BLIP image captioners with DeepSpeed."""

__version__ = "0.1.0"
