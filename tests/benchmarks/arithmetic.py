"""The arithmetic of a captioner, from its geometry alone: floating-point operations, two for a multiply-add.

Only matrix products count, as is usual (PaLM paper, appendix B): they are what a matmul rate can be held against. In
the backward pass each costs twice its forward, one product for the input's gradient and one for the weight's.
"""

from dataclasses import dataclass

from blipds.models.blip.geometry import BlipGeometry


@dataclass(frozen=True)
class Linear:
    """`count` products of (rows, width_in) with (width_in, width_out)."""

    rows: int
    width_in: int
    width_out: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.width_in * self.width_out * self.count


def image_tokens(g: BlipGeometry) -> int:
    return (g.image_size // g.patch_size) ** 2 + 1


def patch_embedding(g: BlipGeometry, images: int) -> Linear:
    return Linear(images * (image_tokens(g) - 1), 3 * g.patch_size**2, g.vision_width)


def encoder_linears(g: BlipGeometry, images: int) -> list[Linear]:
    """The projections of the encoder's blocks."""
    rows, width, depth = images * image_tokens(g), g.vision_width, g.vision_depth
    return [
        Linear(rows, width, 3 * width, depth),
        Linear(rows, width, width, depth),
        Linear(rows, width, g.vision_mlp_dim, depth),
        Linear(rows, g.vision_mlp_dim, width, depth),
    ]


def image_key_value_linears(g: BlipGeometry, images: int) -> list[Linear]:
    """Keys and values of the cross-attention, in each layer of the decoder."""
    return [Linear(images * image_tokens(g), g.vision_width, g.hidden_size, 2 * g.num_hidden_layers)]


def decoder_linears(g: BlipGeometry, rows: int) -> list[Linear]:
    """All other projections of the decoder's layers, for `rows` tokens."""
    width, layers = g.hidden_size, g.num_hidden_layers
    return [
        Linear(rows, width, width, 6 * layers),  # query, key, value, output; query and output of the cross-attention
        Linear(rows, width, g.intermediate_size, layers),
        Linear(rows, g.intermediate_size, width, layers),
    ]


def head_linears(g: BlipGeometry, rows: int) -> list[Linear]:
    return [Linear(rows, g.hidden_size, g.hidden_size), Linear(rows, g.hidden_size, g.vocab_size)]


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and mixing of one sequence of queries, all heads together."""
    return 4 * queries * keys * width


def total(linears: list[Linear]) -> int:
    return sum(linear.flops for linear in linears)


def encoder_flops(g: BlipGeometry, images: int) -> int:
    """Forward."""
    tokens = image_tokens(g)
    blocks = total(encoder_linears(g, images)) + g.vision_depth * images * attention(tokens, tokens, g.vision_width)
    return patch_embedding(g, images).flops + blocks


def text_tokens(captions: int, length: int, prompt: int) -> int:
    """Tokens of one image's text: the prompt once, and of each caption what is neither prompt nor closing token."""
    return prompt + captions * (length - prompt - 1)


def text_flops(g: BlipGeometry, images: int, captions: int, length: int, prompt: int) -> int:
    """Forward of `captions` an image, of `length` tokens each; a label for every token behind the prompt.

    Scores between captions of an image are made and masked, and count.
    """
    tokens = text_tokens(captions, length, prompt)
    mixing = attention(tokens, tokens, g.hidden_size) + attention(tokens, image_tokens(g), g.hidden_size)
    layers = total(decoder_linears(g, images * tokens)) + g.num_hidden_layers * images * mixing
    return layers + total(head_linears(g, images * captions * (length - prompt)))


def training_flops(g: BlipGeometry, images: int, captions: int, length: int, prompt: int) -> int:
    """Forward and backward of `images` with `captions` each. Pixels need no gradient."""
    forward = encoder_flops(g, images) + total(image_key_value_linears(g, images))
    forward += text_flops(g, images, captions, length, prompt)
    return 3 * forward - patch_embedding(g, images).flops


def training_linears(g: BlipGeometry, images: int, captions: int, length: int, prompt: int) -> list[Linear]:
    """The shapes that a training step spends its time on: what the machine's matmul rate is measured with."""
    return [
        *encoder_linears(g, images),
        *image_key_value_linears(g, images),
        *decoder_linears(g, images * text_tokens(captions, length, prompt)),
        *head_linears(g, images * captions * (length - prompt)),
    ]


def generation_flops(g: BlipGeometry, images: int, beams: int, prompt: int, length: int) -> int:
    """Forward of `images` to captions of `length` tokens, the prompt's `prompt` among them, everything cached.

    The prompt goes in once an image, then each step adds a token a beam; the last token is never fed.
    """
    flops = encoder_flops(g, images) + total(image_key_value_linears(g, images))
    layers, width, keys = g.num_hidden_layers, g.hidden_size, image_tokens(g)
    flops += total(decoder_linears(g, images * prompt)) + total(head_linears(g, images))
    flops += layers * images * (attention(prompt, prompt, width) + attention(prompt, keys, width))
    for step in range(prompt + 1, length):
        flops += total(decoder_linears(g, images * beams)) + total(head_linears(g, images * beams))
        flops += layers * images * beams * (attention(1, step, width) + attention(1, keys, width))
    return flops
