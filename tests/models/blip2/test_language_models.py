"""Any causal language model of transformers (`model.llm`), held against transformers' own use of it."""

from dataclasses import replace

import pytest
import torch
from held_memory import live_bytes
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from blipds.models import build_model
from blipds.models.blip2.causal import CachedLanguageModel, text_logits
from blipds.models.generation import GenerationConfig, search
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights

SIZES = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM, False), "qwen2": (Qwen2Config, Qwen2ForCausalLM, True)}


@pytest.fixture(params=KINDS)
def theirs(request, shared, tmp_path):
    """A language model of random weights, and its folder, tokenizer and all."""
    kind, model, tied = KINDS[request.param]
    torch.manual_seed(0)
    made = model(kind(**SIZES, tie_word_embeddings=tied)).eval()
    made.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((shared / "oracle_blip2" / "opt" / name).read_bytes())
    return made, str(tmp_path)


@torch.no_grad()
def test_it_computes_what_transformers_does(theirs, build):
    made, folder = theirs
    ours = build(part="language model", llm=folder)
    norms = [ours.bridge.ln_vision.weight, ours.bridge.qformer.layernorm.weight]  # of random weights
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    queries = ours.bridge(torch.randn(2, 17, 96))
    words = torch.randint(0, 2000, (2, 2, 5))
    # two captions of five tokens in a row, behind a prompt of two
    prompt = torch.tensor([2, 68]).expand(2, -1)
    row = torch.cat([prompt, words.flatten(1)], 1)
    places = torch.tensor([0, 1, *range(2, 7), *range(2, 7)]).expand(2, -1)
    segments = torch.tensor([0, 0] + [1] * 5 + [2] * 5).expand(2, -1)
    logits = text_logits(ours.language_model, queries, row, places, segments)
    for caption in range(2):
        alone = made.get_input_embeddings()(torch.cat([prompt, words[:, caption]], 1))
        expected = made(inputs_embeds=torch.cat([queries, alone], 1)).logits[:, -5:]
        torch.testing.assert_close(logits[:, 2 + 5 * caption : 7 + 5 * caption], expected, rtol=0, atol=1e-4)

    start = torch.cat([queries, made.get_input_embeddings()(prompt)], 1)
    expected = made.generate(
        inputs_embeds=start,
        attention_mask=torch.ones(start.shape[:2], dtype=torch.long),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=1999,
        pad_token_id=1,
    )
    decoder = CachedLanguageModel(ours.language_model, queries)
    found = search(decoder, prompt[0], 2, 1999, GenerationConfig(num_beams=1, max_len=11, min_len=1))
    assert [sequence[2:] for sequence in found] == expected.tolist()


def test_rotary_frequencies_stay_exact(theirs, build):
    _, folder = theirs
    language_model = build(part="language model", llm=folder).language_model
    exact = language_model.model.rotary_emb.inv_freq.clone()
    language_model.bfloat16()
    assert not torch.equal(language_model.model.rotary_emb.inv_freq.float(), exact)
    ids, places = torch.tensor([[2, 68]]), torch.tensor([[0, 1]])
    text_logits(language_model, torch.zeros(1, 8, 64, dtype=torch.bfloat16), ids, places, places * 0)
    assert torch.equal(language_model.model.rotary_emb.inv_freq, exact)


def test_no_copy_in_another_precision(config, shared, tmp_path):
    """A run in bf16 builds the language model in it and fills it from the map: by the allocator's record."""
    sizes = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 1024, "num_attention_heads": 4}
    OPTForCausalLM(OPTConfig(vocab_size=2000, **sizes)).bfloat16().save_pretrained(tmp_path)
    stored = open_weights(str(tmp_path), shared)  # the map: the file's own pages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build_model(replace(config.model, llm=str(tmp_path)), keep_activations, torch.bfloat16)
        load_weights(model, stored, lambda line: None, part="language model")
    frozen = {id(parameter): parameter.nbytes for parameter in model.language_model.parameters()}
    assert {(p.dtype, id(p) in frozen) for p in model.parameters()} == {(torch.bfloat16, True), (torch.float32, False)}
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert max(size for _, size in live_bytes(recorded)) < held + 0.25 * sum(frozen.values())
