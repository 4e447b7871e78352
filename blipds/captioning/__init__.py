"""From images to captions: the captioner, its inputs and outputs."""
