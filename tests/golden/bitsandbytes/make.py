"""Make the directories beside this file with transformers and bitsandbytes themselves (`make peers` installs them).

A tiny Llama in NF4, in NF4 with double quantization, and in INT8; of the first two the hash of what the library decodes
each weight to, in float32, and the logits of its own forward pass (of INT8 the library rounds inputs too).
"""

import hashlib
import json
import tempfile
from pathlib import Path

import bitsandbytes
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip
TOKENS = [3, 41, 7, 19, 0, 26, 11]


def main(folder: Path) -> None:
    """Write everything; `folder` holds the original meanwhile."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dense = LlamaForCausalLM(CONFIG).float()
    for parameter in dense.parameters():
        parameter.data = torch.randn_like(parameter) * 0.15
    dense.save_pretrained(folder)
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    kinds = {"nf4": four, "nf4_double": four | {"bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}
    expected = {"versions": {m.__name__: m.__version__ for m in (torch, transformers, bitsandbytes)}, "tokens": TOKENS}
    for name, settings in kinds.items():
        quantization = BitsAndBytesConfig(**settings)
        model = LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", quantization_config=quantization
        )
        model.save_pretrained(HERE / name)
        (HERE / name / "model.safetensors").chmod(0o644)
        hashes = {}
        for module, linear in model.named_modules():
            if isinstance(linear, bitsandbytes.nn.Linear4bit):
                weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
                assert weight.dtype == torch.float32
                hashes[module] = hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
        if hashes:
            with torch.no_grad():
                logits = model(torch.tensor([TOKENS])).logits[0].float()
            expected[name] = {"sha256": hashes, "logits": [[round(x, 6) for x in row] for row in logits.tolist()]}
    (HERE / "expected.json").write_text(json.dumps(expected) + "\n")


with tempfile.TemporaryDirectory() as made:
    main(Path(made))
