#!/usr/bin/env python3
"""Makes tests/data/families: a tiny random checkpoint of every family of models that lowkey runs,
and the logits that transformers computes of it, which tests/families.rs holds both decoders to.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch transformers safetensors numpy
    /tmp/venv/bin/python tests/tools/families.py            # all of them, or those that are named

The committed ones are of transformers 5.24.0 and torch 2.15.0.

Weights are large enough for every detail to matter: gains are far from one, biases far from zero,
and the prompt is longer than any window and than the context of scaled RoPE. A fixture holds
config.json, model.safetensors in f16, and expected.safetensors: `tokens` [200] i32, `positions` [n]
i32, and `logits` [n, vocabulary] f32 after these.
"""

import argparse
import pathlib

import numpy
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 200
POSITIONS = [0, 1, 7, 30, 100, 163, 199]
SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=False,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
WINDOWED = dict(num_hidden_layers=4, sliding_window=24)
ALTERNATING = ["sliding_attention", "full_attention"] * 2

# By name of the fixture: the model's type, and what differs from SHAPE.
FAMILIES = {
    "llama-biases": ("llama", dict(head_dim=8, attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "llama-proportional": ("llama", dict(head_dim=16, rope_parameters=dict(rope_type="proportional", rope_theta=10000.0, partial_rotary_factor=0.5, factor=2.0))),
    "qwen2-windows": ("qwen2", dict(use_sliding_window=True, sliding_window=24, max_window_layers=1, layer_types=["full_attention"] + ["sliding_attention"] * 2)),
    "internlm3": ("internlm3", dict(head_dim=8, attention_bias=True, mlp_bias=True, rope_parameters=dict(rope_type="dynamic", rope_theta=50000.0, factor=6.0))),
    "llama-yarn": ("llama", dict(head_dim=16, rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0))),
    "llama-dynamic": ("llama", dict(head_dim=8, max_position_embeddings=64, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0))),
    "smollm3": ("smollm3", dict(no_rope_layers=[1, 0, 1, 0], num_hidden_layers=4, sliding_window=24, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"] * 2)),
    "seed_oss": ("seed_oss", dict(head_dim=16, attention_bias=True, attention_out_bias=True)),
    "arcee": ("arcee", dict(rope_parameters=YARN)),
    "ernie4_5": ("ernie4_5", dict(head_dim=16, use_bias=True, tie_word_embeddings=True)),
    "ministral3": ("ministral3", dict(head_dim=16, rope_parameters=YARN | dict(llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0))),
    "hunyuan": ("hunyuan_v1_dense", dict(head_dim=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, alpha=50.0, factor=1.0))),
    "exaone4": ("exaone4", WINDOWED | dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], sliding_window_pattern=4)),
    "granite": ("granite", dict(embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5, attention_bias=True, mlp_bias=True)),
    "olmo2": ("olmo2", dict()),
    "olmo3": ("olmo3", WINDOWED | dict(layer_types=["sliding_attention"] * 3 + ["full_attention"], rope_parameters=YARN)),
    "gemma": ("gemma", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": ("gemma2", WINDOWED | dict(head_dim=16, layer_types=ALTERNATING, tie_word_embeddings=True, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)),
    "gemma3": ("gemma3_text", WINDOWED | dict(head_dim=16, layer_types=["sliding_attention"] * 3 + ["full_attention"], tie_word_embeddings=True, query_pre_attn_scalar=24,
               rope_parameters=dict(full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0), sliding_attention=dict(rope_type="default", rope_theta=1e4)))),
    "phi3": ("phi3", WINDOWED | dict(layer_types=None, max_position_embeddings=512, original_max_position_embeddings=64, sliding_window=96,
             rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.5, original_max_position_embeddings=64, short_factor=[1.0, 1.5], long_factor=[1.2, 4.0]))),
    "phi3-short": ("phi3", dict(sliding_window=None, max_position_embeddings=1024, original_max_position_embeddings=256,
                   rope_parameters=dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=1.0, original_max_position_embeddings=256, short_factor=[1.0, 1.1, 1.5, 2.0], long_factor=[1.2, 2.0, 3.0, 4.0]))),
    "glm": ("glm", dict(head_dim=16, attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "glm4": ("glm4", dict(head_dim=16, attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "starcoder2": ("starcoder2", dict(sliding_window=24, tie_word_embeddings=True, use_bias=True)),
    "helium": ("helium", dict(head_dim=8, mlp_bias=True)),
    "vaultgemma": ("vaultgemma", WINDOWED | dict(head_dim=16, layer_types=ALTERNATING, tie_word_embeddings=True, query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)),
    "nemotron": ("nemotron", dict(head_dim=16, num_attention_heads=2, mlp_bias=True, attention_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    "ministral": ("ministral", WINDOWED | dict(head_dim=8, layer_types=["full_attention"] + ["sliding_attention"] * 3)),
    "stablelm": ("stablelm", dict(use_qkv_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25), num_attention_heads=2)),
}  # fmt: skip


def randomise(model, generator):
    """Numbers of the size that keeps activations near one, and none that changes nothing."""
    norm = lambda *shape: torch.randn(*shape, generator=generator)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            table = "embed" in name or "lm_head" in name
            p.data = norm(*p.shape) * (2.5 if table else 1.3) * p.shape[1] ** -0.5
        elif name.endswith("bias"):
            p.data = norm(*p.shape) * 0.3
        else:
            # Gemma and GLM begin with other gains than ones: what is random is added to these.
            p.data = p.data + norm(*p.shape) * 0.3
        p.data = p.data.half().float()


def make(directory, name):
    kind, changed = FAMILIES[name]
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    config = AutoConfig.for_model(kind, **(SHAPE | changed))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, generator)
    tokens = torch.randint(3, config.vocab_size, (1, TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0, POSITIONS]
    out = directory / name
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    expected = dict(tokens=tokens[0].int().numpy(), positions=numpy.array(POSITIONS, dtype=numpy.int32), logits=logits.float().numpy())
    save_file(expected, out / "expected.safetensors")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, logits of {logits.std():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "data" / "families")
    arguments = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in arguments.names:
        make(arguments.to, name)
