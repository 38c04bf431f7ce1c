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
import json
import pathlib

import numpy
import torch
import transformers
from safetensors.numpy import load_file, save_file
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
GPT_OSS = dict(
    head_dim=16, intermediate_size=32, num_local_experts=6, num_experts_per_tok=4, swiglu_limit=2.0, sliding_window=24,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters=YARN | dict(beta_fast=32.0, beta_slow=1.0, truncate=False),
)  # fmt: skip
# The fixtures whose experts are stored in MXFP4.
MXFP4 = ["gpt_oss"]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Routers' logits of the last expert that is chosen and of the first that is not are at least as
# far apart: where they are not, rounding decides what is computed.
MARGIN = 0.15

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
    "mixtral": ("mixtral", dict(head_dim=8, intermediate_size=20, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=16, moe_intermediate_size=12, num_experts=9, num_experts_per_tok=4, norm_topk_prob=True)),
    "gpt_oss": ("gpt_oss", GPT_OSS | dict(hidden_size=64)),
    "gpt_oss-plain": ("gpt_oss", GPT_OSS | dict(intermediate_size=20, swiglu_limit=1.5, swiglu_alpha=1.3)),
    "olmoe": ("olmoe", dict(intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False)),
    "qwen2_moe": ("qwen2_moe", dict(moe_intermediate_size=12, shared_expert_intermediate_size=36, num_experts=6, num_experts_per_tok=2, norm_topk_prob=False)),
    "granitemoe": ("granitemoe", dict(intermediate_size=20, num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.5)),
    "stablelm": ("stablelm", dict(use_qkv_bias=True, rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25), num_attention_heads=2)),
}  # fmt: skip


def randomise(model, generator):
    """Numbers of the size that keeps activations near one, and none that changes nothing."""
    norm = lambda *shape: torch.randn(*shape, generator=generator)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data = norm(*p.shape) * 0.3
        elif name.endswith("sinks"):
            p.data = norm(*p.shape) + 1.0
        elif p.dim() == 3:
            # Experts, and those of gpt-oss by input first.
            inputs = p.shape[1] if model.config.model_type == "gpt_oss" else p.shape[2]
            p.data = norm(*p.shape) * 1.3 * inputs**-0.5
        elif p.dim() == 2:
            table, router = "embed" in name or "lm_head" in name, name.endswith((".gate.weight", ".router.weight"))
            p.data = norm(*p.shape) * (2.5 if table or router else 1.3) * p.shape[1] ** -0.5
        else:
            # Gemma and GLM begin with other gains than ones: what is random is added to these.
            p.data = p.data + norm(*p.shape) * 0.3
        p.data = p.data.half().float()


def to_mxfp4(weight):
    """Blocks and scales of [experts, inputs, outputs], as gpt-oss' files have them, and the numbers
    that they stand for: two codes in a byte, of 32 inputs of an output with one exponent."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    scaled = groups / 2**exponent
    index = (scaled.abs().unsqueeze(-1) - FP4).abs().argmin(-1)
    numbers = FP4[index] * torch.where(scaled < 0, -1.0, 1.0) * 2**exponent
    codes = (index + 8 * (scaled < 0)).to(torch.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, (exponent.squeeze(-1) + 127).to(torch.uint8), numbers.flatten(2).transpose(1, 2)


def settle(model, tokens, generator):
    """Logits, once every token whose choice of experts is a near thing has been replaced."""
    gaps = []

    def look(_, __, output):
        chosen = output[2].shape[1]
        best = output[0].sort(dim=-1, descending=True).values
        gaps.append(best[:, chosen - 1] - best[:, chosen])

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(look) for router in routers]
    while True:
        gaps.clear()
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0, POSITIONS]
        near = torch.stack(gaps).amin(0) < MARGIN if gaps else torch.zeros(TOKENS)
        if not near.any():
            break
        tokens[0, near.nonzero()[0]] = torch.randint(3, model.config.vocab_size, (1,), generator=generator)
    for hook in hooks:
        hook.remove()
    return logits


def make(directory, name):
    kind, changed = FAMILIES[name]
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    config = AutoConfig.for_model(kind, **(SHAPE | changed))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, generator)
    packed = {}
    for key, p in model.named_parameters():
        if name in MXFP4 and p.dim() == 3:
            packed[key + "_blocks"], packed[key + "_scales"], p.data = to_mxfp4(p.data)
    tokens = torch.randint(3, config.vocab_size, (1, TOKENS), generator=generator)
    logits = settle(model, tokens, generator)
    out = directory / name
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    if packed:
        pack(out, packed)
    expected = dict(tokens=tokens[0].int().numpy(), positions=numpy.array(POSITIONS, dtype=numpy.int32), logits=logits.float().numpy())
    save_file(expected, out / "expected.safetensors")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{name}: {size / 1000:.0f} kB, logits of {logits.std():.2f}")


def pack(out, packed):
    """Puts blocks and scales in the place of what they were made from."""
    tensors = load_file(out / "model.safetensors")
    for key, tensor in packed.items():
        tensors.pop(key.rsplit("_", 1)[0], None)
        tensors[key] = tensor.contiguous().numpy()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "data" / "families")
    arguments = parser.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for name in arguments.names:
        make(arguments.to, name)
