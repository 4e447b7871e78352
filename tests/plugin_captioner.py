# fmt: off
"""All that a plugin can bring (`--plugin tests.plugin_captioner`); reads one caption a row: captions_per_image: 1."""
# ruff: noqa: I001
from dataclasses import dataclass

import torch

from blipds.config.sections import ModelConfig
from blipds.data.annotations import Record, annotations_of
from blipds.data.processors import BlipImageEval
from blipds.data.shapes import make_scenes
from blipds.models.loss import smoothed_cross_entropy
from blipds.models.protocol import Arch, CaptioningModel
from blipds.registry import ARCHS, DATASETS, OBJECTIVES, PROCESSORS, SCHEDULES
from blipds.training.objectives import CrossEntropy
from blipds.training.schedules import ConstantLR
@dataclass
class GruConfig(ModelConfig):
    width: int = 32
@ARCHS.register("conv_gru")
class ConvGru(Arch):
    """A convolution that looks at the image, and a GRU that writes the caption."""
    config = GruConfig
    def build(self, config, checkpoint_fn):
        return GruCaptioner(config.width)
class GruCaptioner(CaptioningModel):
    vocab_size = 30524
    def __init__(self, width):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, stride=8), torch.nn.ReLU(), torch.nn.Flatten(2))
        self.words = torch.nn.Embedding(self.vocab_size, width)
        self.gru = torch.nn.GRU(width, width, batch_first=True)
        self.head = torch.nn.Linear(width, self.vocab_size)
    @property
    def image_encoder(self):
        return self.encoder
    def forward(self, input_ids, position_ids, segment_ids, label_positions, labels,
                pixel_values=None, image_embeds=None, label_weights=None):
        steps = self.step_decoder(self.encode(pixel_values, image_embeds), None)
        logits = self.head(steps.states(input_ids).flatten(0, 1)[label_positions])
        return smoothed_cross_entropy(logits, labels, 0.0, label_weights)
    def step_decoder(self, image_embeds, max_len):
        return Steps(self, image_embeds.mean(-1).unsqueeze(0))
class Steps:
    """generation.StepDecoder: J images with K captions each; the GRU's state is (1, J * K, width)."""
    def __init__(self, model, state):
        self.model, self.state = model, state
    def states(self, tokens):
        found, self.state = self.model.gru(self.model.words(tokens), self.state)
        return found
    def start(self, prompt_ids, beams):
        logits = self.model.head(self.states(prompt_ids.expand(self.state.shape[1], -1))[:, -1])
        self.state, self.beams = self.state.repeat_interleave(beams, 1), beams
        return logits
    def step(self, tokens):
        return self.model.head(self.states(tokens.reshape(-1, 1))).view(*tokens.shape, -1)
    def reorder(self, parents):
        self.state = self.state[:, (torch.arange(len(parents))[:, None] * self.beams + parents).flatten()]
    def keep(self, images):
        self.state = self.state.unflatten(1, (-1, self.beams))[:, images].flatten(1, 2)
@DATASETS.register("few_shapes")
def few_shapes(dataset, config, split, training):
    """Forty drawn scenes."""
    scenes = make_scenes(split, 40, config.run.seed)
    return annotations_of([Record(scene, tuple(scene.captions()), scene.id) for scene in scenes])
@PROCESSORS.register("upside_down")
class UpsideDown(BlipImageEval):
    """As blip_image_eval, and turned by 180 degrees."""
    def __call__(self, image):
        return super().__call__(image.rotate(180))
@SCHEDULES.register("half")
class Half(ConstantLR):
    """Half of run.init_lr, always."""
    def lr(self, epoch, step, global_step):
        return self.init_lr / 2
@OBJECTIVES.register("doubled")
class Doubled(CrossEntropy):
    """Twice the cross-entropy."""
    def loss(self, engine, batch):
        return 2 * super().loss(engine, batch)
