"""TensorRT-LLM checkpoints of a tiny Llama as Model Optimizer itself writes them, into this folder or another.

Run by the peers' Python (benchmarks/peers.txt): .venv-peers/bin/python tests/golden/trtllm/make.py [FOLDER]
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import warnings
from pathlib import Path

import modelopt
import modelopt.torch.quantization as mtq
import torch
import transformers
from modelopt.torch.export import export_tensorrt_llm_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
KV = mtq.FP8_KV_CFG["quant_cfg"]
WAYS = {
    "fp8": (mtq.FP8_DEFAULT_CFG, True, 64, 1, 1),
    "int8_sq": (mtq.INT8_SMOOTHQUANT_CFG, False, 64, 1, 1),
    "int8_wo": (mtq.INT8_WEIGHT_ONLY_CFG, False, 64, 1, 1),
    "int4_awq": (mtq.INT4_AWQ_CFG, False, 128, 1, 1),
    "w4a8_awq": (mtq.W4A8_AWQ_BETA_CFG, False, 128, 1, 1),
    "nvfp4": (mtq.NVFP4_DEFAULT_CFG, True, 64, 1, 1),
    "fp8_tp2_pp2": (mtq.FP8_DEFAULT_CFG, True, 64, 2, 2),
    "bf16_tp2": (None, False, 64, 2, 1),
}
"""By our names Model Optimizer's config, whether K and V are FP8 too, width, tensor and pipeline ranks."""


def model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    for name, (config, kv, width, tp, pp) in WAYS.items():
        made = model(width, pp)
        if config is not None:
            config = copy.deepcopy(config)
            if kv:
                config["quant_cfg"] = [*config["quant_cfg"], *KV]
            made = mtq.quantize(made, config, lambda m: m(tokens))
        with torch.inference_mode():
            export_tensorrt_llm_checkpoint(made, "llama", torch.bfloat16, folder / name, tp, pp)
    versions = {m.__name__: m.__version__ for m in (modelopt, torch, transformers)}
    (folder / "versions.json").write_text(
        json.dumps({"python": platform.python_version(), **versions}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
