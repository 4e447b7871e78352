"""Captions from images: our cached beam search against transformers' `generate`."""

import torch
from benchmarks.arithmetic import generation_flops
from benchmarks.measuring import Row, alternate
from benchmarks.pair import PROMPT, SEP, Size, build_ours, random_pixels, transformers_twin

from blipds.models.blip.geometry import geometry_of
from blipds.models.generation import GenerationConfig

CONFIG = GenerationConfig(num_beams=3, max_len=20, min_len=5)


@torch.no_grad()
def generation(
    geometry: str,
    image_size: int,
    size: Size,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """The paper's setting: beam 3, max_len 20, min_len 5. Random weights never end a caption: all run to 20."""
    model = build_ours(geometry, image_size, 0.0, device).eval().to(dtype)
    twin = transformers_twin(model).eval().to(dtype)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    g = geometry_of(model)
    pixels = random_pixels(size.images, g, device).to(dtype)
    prompt_ids = torch.tensor(PROMPT, device=device)
    captions: dict[str, list[list[int]]] = {}
    torch.backends.cuda.enable_flash_sdp(True)  # as `Engine.evaluating` does

    def ours() -> None:
        captions["ours"] = model.generate(prompt_ids, SEP, CONFIG, pixel_values=pixels)

    def theirs() -> None:
        sequences = twin.generate(
            pixel_values=pixels,
            input_ids=torch.tensor([[*PROMPT, SEP]] * size.images, device=device),
            num_beams=CONFIG.num_beams,
            max_length=CONFIG.max_len,
            min_length=CONFIG.min_len,
            do_sample=False,
        )
        captions["theirs"] = [[token for token in row if token not in (0, SEP)] for row in sequences.tolist()]

    timings = alternate({"ours": ours, "transformers": theirs}, rounds, device)
    same = sum(mine == other for mine, other in zip(captions["ours"], captions["theirs"], strict=True))
    quick, slow = timings["ours"], timings["transformers"]
    flops = generation_flops(g, size.images, CONFIG.num_beams, len(PROMPT), CONFIG.max_len)
    return [
        Row(
            "generation",
            f"images/s, beam 3, max_len 20, {precision} ({same} of {size.images} captions equal)",
            f"{size.images / quick.median:.2f}",
            f"{size.images / slow.median:.2f} (transformers)",
            slow.median / quick.median,
            3.0,
            {
                "seconds": quick.seconds,
                "transformers_seconds": slow.seconds,
                "same_captions": same,
                "gflop": flops / 1e9,
                "gflop_per_s": flops / quick.median / 1e9,
                "peak_gb": quick.peak_bytes / 1e9,
                "transformers_peak_gb": slow.peak_bytes / 1e9,
            },
        )
    ]
