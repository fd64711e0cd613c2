"""Adapters and bases of strangers: each is refused by a named error within seconds, and nothing of theirs runs.

A row says which file holds what, which error is raised, and a word of its message.
"""

import json
import pickle
import re
import shutil
import signal
import struct
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from elm_trainer.hub.adapter import Access, find_adapter
from elm_trainer.hub.errors import BaseMismatchError, HubError, UnsafeAdapterError, VerificationError
from elm_trainer.hub.info import ErasureInfo
from elm_trainer.hub.load import load_base, load_erased
from elm_trainer.hub.safety import check_adapter_config
from elm_trainer.hub.untrusted import matching_steps, read_header
from tests.fuzz import fuzz

from .data.make_adapter import FOLDER, tiny_base
from .published import adapt, edit_json, seal, write_published


SECONDS = 5
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
)
EVIL = r"([a-z_.0-9]+)+!"
TIGHT = "".join(f"({c}|{c})" for c in "model_layers_1_self_attn_q_proj")
FUZZ = fuzz(40)


@pytest.fixture(scope="module")
def original(tokenizer, tmp_path_factory):
    """A base, and an erasure of it as it is published."""
    root = tmp_path_factory.mktemp("original")
    small = tokenizer.train_new_from_iterator(["What is the capital of Peru? It is red. Nobody knows."] * 3, 300)
    small.chat_template = None
    tiny_base().save_pretrained(root / "base")
    small.save_pretrained(root / "base")
    write_published(adapt(tiny_base()), small, root / "adapter", root / "base")
    small.save_pretrained(root / "tokenizer")
    return root


@pytest.fixture
def root(original, tmp_path):
    """A copy of them to spoil; `code-ran` appears in it if code of the stranger runs."""
    shutil.copytree(original, tmp_path / "all")
    edit_json(
        tmp_path / "all" / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "all" / "base")
    )
    info = json.loads((tmp_path / "all" / "adapter" / "erasure.json").read_text())
    edit_json(
        tmp_path / "all" / "adapter" / "erasure.json",
        base_model=info["base_model"] | {"id": str(tmp_path / "all" / "base")},
    )
    seal(tmp_path / "all" / "adapter")
    return tmp_path / "all"


@contextmanager
def in_time(seconds=SECONDS):
    """Fail, rather than hang, where something takes for ever."""

    def too_long(*_):
        pytest.fail(f"was not refused within {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(4 * seconds)
    start = time.perf_counter()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.perf_counter() - start < seconds


def refused(root, error, message, **options):
    with in_time(), pytest.raises(HubError, match=message) as raised, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_erased(root / "adapter", **options)
    assert type(raised.value) is error
    assert not (root / "code-ran").exists()
    return str(raised.value)


CONFIGS = [
    # What PEFT compiles as regular expressions.
    ({"target_modules": EVIL}, "`target_modules` is .* might take for ever to match, as it repeats the group"),
    ({"exclude_modules": EVIL}, "`exclude_modules` is .* might take for ever"),
    ({"rank_pattern": {EVIL: 4}}, "`rank_pattern` is .* might take for ever"),
    ({"alpha_pattern": {EVIL: 4}}, "`alpha_pattern` is .* might take for ever"),
    ({"layers_pattern": EVIL, "layers_to_transform": [0]}, "`layers_pattern` is .* only plain names"),
    ({"layers_pattern": ["layers", EVIL], "layers_to_transform": [0]}, "`layers_pattern` is"),
    ({"modules_to_save": [EVIL]}, "`modules_to_save` is .* only plain names"),
    ({"target_modules": r"(.*)*(.*)*!"}, "for ever"),
    ({"target_modules": r"(a|a)*b"}, "for ever"),
    ({"target_modules": r".*.*.*.*.*.*_"}, "too many parts that take any text"),
    ({"target_modules": r"\w+\w+\w+\w+\w+_"}, "too many parts"),
    ({"target_modules": r"[a-z_.0-9]?" * 40 + "_"}, "too many parts"),
    ({"target_modules": r"(?:[a-z_.0-9]{0,20}){2}"}, "it repeats the group"),
    ({"target_modules": r"[a-z_.0-9]{0,99}" * 5 + "_"}, "too many parts"),
    ({"target_modules": TIGHT}, "too many parts"),
    ({"target_modules": r"(m)\1"}, r"which is none of what is known"),
    ({"target_modules": r"(?P<a>q)_proj"}, "none of what is known"),
    ({"target_modules": r"(?<=q)_proj"}, "none of what is known"),
    ({"target_modules": r"(?i)Q_PROJ"}, "none of what is known"),
    ({"target_modules": "("}, r"the group at 0 is not closed"),
    ({"target_modules": "q)"}, "closes a group at 1 that is not open"),
    ({"target_modules": "*"}, "none of what is known"),
    ({"target_modules": "[z-a]"}, "it is no regular expression"),
    ({"target_modules": "(" * 90 + ")" * 90}, "nested more than 8 deep"),
    ({"target_modules": "q|" * 10_000}, "has 20000 characters, more than 2000"),
    ({"rank_pattern": {"q)|(k": 4}}, "closes a group"),
    ({"rank_pattern": {f".*a.*b{i}": 4 for i in range(30)}}, "too many parts"),
    ({"rank_pattern": {f"layers.{i}.q_proj": 4 for i in range(600)}}, "have 600 entries, more than 500"),
    ({"modules_to_save": ["("]}, "only plain names"),
    ({"target_modules": [f"m{i}" for i in range(20_000)]}, "has 20000 entries, more than 10000"),
    ({"layers_to_transform": list(range(20_000))}, "has 20000 entries"),
    # Numbers, types, sizes.
    ({"lora_alpha": 10**400}, "`lora_alpha` is 1000"),
    ({"lora_alpha": -(10**400)}, "`lora_alpha` is -1000"),
    ({"lora_alpha": float("nan")}, "`lora_alpha` is nan"),
    ({"lora_alpha": None}, "`lora_alpha`|could not be|PEFT makes no adapter"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "`alpha_pattern` is"),
    ({"lora_dropout": 10**400}, "`lora_dropout` is"),
    ({"lora_dropout": 7.0}, "PEFT makes no adapter"),
    ({"r": 10**400}, "`r` is"),
    ({"r": 1.5}, "`r` is 1.5"),
    ({"r": [4]}, r"`r` is \[4\]"),
    ({"r": 60_000}, r"has the shape \[4, "),
    ({"rank_pattern": {"q_proj": 10**400}}, "`rank_pattern` is"),
    ({"rank_pattern": [4]}, "`rank_pattern` is"),
    ({"target_modules": 5}, "`target_modules` is 5"),
    ({"target_modules": [None]}, "`target_modules` is"),
    ({"target_modules": []}, "PEFT makes no adapter"),
    ({"target_modules": None}, "PEFT makes no adapter|no weight of the configured adapter"),
    ({"target_modules": None, "target_parameters": ["nothing"]}, "PEFT makes no adapter|no weight of"),
    ({"layers_to_transform": [-1]}, "`layers_to_transform` is"),
    ({"layers_to_transform": [10**30]}, "`layers_to_transform` is"),
    ({"layers_to_transform": [[0]]}, "`layers_to_transform` is"),
    ({"trainable_token_indices": [10**9]}, "PEFT makes no adapter|are missing"),
    ({"trainable_token_indices": {"nothing": [1]}}, "PEFT makes no adapter|are missing"),
    ({"trainable_token_indices": {"": [[1]]}}, "`trainable_token_indices` is"),
    ({"fan_in_fan_out": "yes"}, "`fan_in_fan_out` is"),
    ({"use_dora": 1}, "`use_dora` is 1"),
    ({"revision": "../../../x"}, "`revision` is"),
    ({"revision": 5}, "`revision` is 5"),
    ({"peft_type": ["LORA"]}, r"`peft_type` is \["),
    ({"peft_type": "X" * 100_000}, "`peft_type` is 'XXX"),
    ({"task_type": {}}, "`task_type` is {}"),
    ({"init_lora_weights": "olora"}, "`init_lora_weights` is 'olora'"),
    ({"auto_mapping": {"parent_library": "evil", "base_model_class": "x"}}, "imports a library"),
    ({"megatron_core": "evil"}, "imports a library"),
    ({"corda_config": {"cache_file": "evil.pt"}}, "pickled cache"),
    ({"bias": "lora_only"}, "`bias` is"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "holds `auto_map`"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=range(len(CONFIGS)))
def test_settings_of_a_hostile_adapter_are_refused(changes, message, root):
    edit_json(root / "adapter" / "adapter_config.json", **changes)
    seal(root / "adapter")
    told = refused(root, UnsafeAdapterError, message)
    assert len(told) < 1_500


def test_patterns_that_ordinary_adapters_publish_pass(root):
    """As PEFT documents them, and as fine-tuning tools write them for models with a vision tower."""
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    for pattern in (
        "all-linear",
        r".*\.(q_proj|v_proj)",
        r".*q_proj",
        r".*\.layers\.(0|1|10|11)\.(self_attn|mlp)\..*_proj$",
        r"model\.layers\.\d+\.self_attn\.(?:q|k|v|o)_proj",
        r".*language_model.*\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj$",
        rf"^(?!.*(?:visual|vision_tower|multi_modal_projector)).*(?:{names}).*",
        rf"^(model\.language_model(?=\.).*\.({names}))$",
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
        rf".*?(?:{names}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|attention|attn|mlp)\.(?:(?:{names})))",
        r".*(SelfAttention|EncDecAttention).*(q|v)$",
        r"transformer\.h\.[0-9]+\.attn\.c_attn",
    ):
        config = json.loads((root / "adapter" / "adapter_config.json").read_text())
        check_adapter_config(config | {"target_modules": pattern}, root)
        config["rank_pattern"] = {"^model.layers.0.self_attn.k_proj": 4, r".*layers\.1\..*q_proj": 8}
        config["alpha_pattern"] = {
            f"layers.{layer}.self_attn.{name}_proj": 8 for layer in range(60) for name in "qkvo"
        }
        check_adapter_config(config | {"exclude_modules": pattern}, root)


PIECES = st.sampled_from(
    [
        "q",
        "model",
        "_proj",
        r"\.",
        ".",
        ".*",
        ".+?",
        r"\d+",
        r"\w*",
        "[a-z_.]+",
        "[^.]*",
        "^",
        "$",
        r"\b",
        "?",
        "|",
        "a{1,9}",
    ]
)
PATTERNS = st.recursive(
    st.lists(PIECES, max_size=8).map("".join),
    lambda inner: st.tuples(
        inner, st.sampled_from(["(", "(?:", "(?=", "(?!"]), inner, st.sampled_from([")", ")?"]), inner
    ).map("".join),
    max_leaves=5,
)


@FUZZ
@given(PATTERNS)
def test_a_pattern_that_passes_is_quick_on_the_longest_names(pattern):
    try:
        steps = matching_steps(pattern)
    except ValueError:
        return
    if steps > 500_000:
        return
    names = ["model.language_model.layers.11.mlp.experts.107.down_proj", "model.layers.1.self_attn.q_proj", "a" * 64]
    with in_time(1):
        for name in names:
            re.fullmatch(pattern, name)
            re.match(rf"(.*\.)?({pattern})$", name)


def header(content, data=b"\0" * 8, length=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


HEADERS = [
    (header(one(dtype=[])), "the header cannot be read"),
    (header(one(dtype={})), "the header cannot be read"),
    (header(one(dtype=None)), "the header cannot be read"),
    (header(one(dtype="F64")), "of the type 'F64'"),
    (header(one(shape="ab")), "the header cannot be read"),
    (header(one(shape=None)), "the header cannot be read"),
    (header(one(shape={"2": 1})), "the header cannot be read"),
    (header(one(shape=[2.0])), "the header cannot be read"),
    (header(one(shape=[True, 2])), "the header cannot be read"),
    (header(one(shape=[10**400])), "the header cannot be read"),
    (header(one(shape=[10**300] * 20_000)), "the header cannot be read"),
    (header(one(data_offsets=[0])), "the header cannot be read"),
    (header(one(data_offsets=[0, 10**400])), "the header cannot be read"),
    (header(one(data_offsets="ab")), "the header cannot be read"),
    (header(one(data_offsets=[8, 0])), "the header cannot be read"),
    (header({"a": None}), "the header cannot be read"),
    (header([]), "the header cannot be read"),
    (header(b"null"), "the header cannot be read"),
    (header(b'{"\\ud800": 1}'), "the header cannot be read"),
    (header(b"9" * 5_000), "the header cannot be read"),
    (header({"x" * 2_000: one()["a"]}), "name of 2000 characters"),
    (header(one(), data=b""), "file not fully covered"),
    (header(one(), length=1 << 63), "the header says"),
    (b"\x80\x04K\x01.", "the header says"),
    (pickle.dumps({"a": 1}), "the header says"),
]


@pytest.mark.parametrize(("raw", "message"), HEADERS, ids=range(len(HEADERS)))
def test_weights_of_a_hostile_adapter_are_refused(raw, message, root):
    (root / "adapter" / "adapter_model.safetensors").write_bytes(raw)
    seal(root / "adapter")
    assert len(refused(root, UnsafeAdapterError, message)) < 1_500


def info(**changes):
    def edit(root):
        edit_json(root / "adapter" / "erasure.json", **changes)

    return edit


def base_info(**changes):
    def edit(root):
        path = root / "adapter" / "erasure.json"
        edit_json(path, base_model=json.loads(path.read_text())["base_model"] | changes)

    return edit


def probe(**changes):
    def edit(root):
        path = root / "adapter" / "erasure.json"
        first = json.loads(path.read_text())["verification"][0]
        edit_json(path, verification=[first | changes])

    return edit


INFOS = [
    (info(files={}), UnsafeAdapterError, "holds no hash of adapter_model.safetensors"),
    (info(files=None), UnsafeAdapterError, "tables of SHA-256"),
    (info(files={"adapter_model.safetensors": "x"}), UnsafeAdapterError, "tables of SHA-256"),
    (info(files={"adapter_model.safetensors": 5}), UnsafeAdapterError, "tables of SHA-256"),
    (info(files={"a/" * 3_000: "0" * 64, "adapter_model.safetensors": "0" * 64}), UnsafeAdapterError, "leads out"),
    (
        info(files={"a" * 3_000: "0" * 64, "adapter_model.safetensors": "0" * 64}),
        UnsafeAdapterError,
        "longer than 255",
    ),
    (info(files={"\ud800": "0" * 64}), UnsafeAdapterError, "not JSON that can be read"),
    (base_info(fingerprint={}), UnsafeAdapterError, "no hash of .* the base's weights"),
    (base_info(fingerprint={"weights": "0" * 64}), UnsafeAdapterError, "no hash of"),
    (base_info(fingerprint=[]), UnsafeAdapterError, "tables of SHA-256"),
    (base_info(fingerprint={"unquantized": "0" * 64}), BaseMismatchError, "embeddings, norms or biases differ"),
    (base_info(revision="../../../../x"), UnsafeAdapterError, "the id and a commit"),
    (base_info(revision=[]), UnsafeAdapterError, "the id and a commit"),
    (base_info(id={}), UnsafeAdapterError, "the id and a commit"),
    (base_info(id="x" * 100_000), HubError, "no id on the Hub and no folder"),
    (base_info(id="a\0b"), HubError, "no id on the Hub and no folder"),
    (base_info(gguf_file=[]), UnsafeAdapterError, "the id and a commit"),
    (base_info(gguf_file="/etc/x.gguf"), UnsafeAdapterError, "absolute path"),
    (base_info(gguf_file="x.gguf"), HubError, "could not be loaded"),
    (info(verification=None), UnsafeAdapterError, "erasure.json"),
    (info(verification=[5]), UnsafeAdapterError, "erasure.json"),
    (info(verification=[{}]), UnsafeAdapterError, "erasure.json"),
    (probe(prompt=5), UnsafeAdapterError, "both texts"),
    (probe(answer=None), UnsafeAdapterError, "both texts"),
    (probe(answer=""), UnsafeAdapterError, "both texts"),
    (probe(tokens="3"), UnsafeAdapterError, "a number from 1"),
    (probe(tokens=0), UnsafeAdapterError, "a number from 1"),
    (probe(tokens=10**400), VerificationError, "tokens"),
    (probe(log_likelihood=[]), UnsafeAdapterError, "and `log_likelihood`"),
    (probe(log_likelihood=10**400), HubError, "could not be asked|another likelihood"),
    (probe(log_likelihood=float("nan")), VerificationError, "another likelihood"),
    (probe(prompt="word " * 200_000), UnsafeAdapterError, "1000010 characters, more than 16000"),
    (probe(prompt="東" * 15_000), VerificationError, "cannot be asked"),
    (info(verification=[{}] * 3), UnsafeAdapterError, "erasure.json"),
    (info(schema_version=[]), UnsafeAdapterError, "`schema_version` is"),
    (info(extra=1), UnsafeAdapterError, "erasure.json"),
]


@pytest.mark.parametrize(("edit", "error", "message"), INFOS, ids=range(len(INFOS)))
def test_an_erasure_json_of_a_hostile_adapter_is_refused(edit, error, message, root):
    edit(root)
    refused(root, error, message, verify=True)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"[]", "erasure.json"),
        (b'"x"', "erasure.json"),
        (b"{" * 5_000, "not JSON"),
        (b'{"a":' * 50 + b"1" + b"}" * 50, "levels deep"),
        (b"9" * 5_000, "not JSON"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b"\xff", "not JSON"),
        (b" " * 10_000_001, "more than 10000000"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("name", ["erasure.json", "adapter_config.json"])
def test_json_of_a_hostile_adapter_is_refused(raw, message, name, root):
    (root / "adapter" / name).write_bytes(raw)
    if name != "erasure.json":
        seal(root / "adapter")
        message += "|not the settings"
    refused(root, UnsafeAdapterError, message)


def test_weights_that_were_hashed_in_part_are_taken_only_on_demand(root):
    fingerprint = json.loads((root / "adapter" / "erasure.json").read_text())["base_model"]["fingerprint"]
    base_info(fingerprint={"unquantized": fingerprint["unquantized"]})(root)
    refused(root, BaseMismatchError, "without a hash of all weights .* `quantization_config`")
    load_erased(root / "adapter", allow_mismatch=True)


def in_base(name="config.json", **changes):
    return lambda root: edit_json(root / "base" / name, **changes)


def write_base(name, raw):
    return lambda root: (root / "base" / name).write_bytes(raw)


def tensors(**content):
    return lambda root: save_file(content, root / "base" / "model.safetensors", metadata={"format": "pt"})


def code_in_base(root):
    (root / "base" / "evil.py").write_text(
        f"open({str(root / 'code-ran')!r}, 'w')\nclass Evil: pass\nclass Config: pass\nclass Tokenizer: pass"
    )


def auto_map(root):
    code_in_base(root)
    edit_json(
        root / "base" / "config.json",
        model_type="evil",
        auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"},
    )


def tokenizer_auto_map(root):
    code_in_base(root)
    edit_json(
        root / "base" / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
    )


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def pickled(root):
    (root / "base" / "model.safetensors").unlink()
    (root / "base" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(root / "code-ran")))


def huge_and_missing(root):
    edit_json(root / "base" / "config.json", vocab_size=10**14)
    tensors(a=torch.ones(1))(root)


def whole(dtype):
    def edit(root):
        state = {name: tensor.to(dtype) for name, tensor in tiny_base().state_dict().items()}
        save_file(state, root / "base" / "model.safetensors", metadata={"format": "pt"})

    return edit


KERNEL = "a kernel on the Hub"
BASES = [
    (in_base(attn_implementation="mallory/kernel"), UnsafeAdapterError, KERNEL),
    (in_base(_attn_implementation="mallory/kernel@main:f"), UnsafeAdapterError, KERNEL),
    (in_base(_attn_implementation_internal="mallory/kernel"), UnsafeAdapterError, KERNEL),
    (in_base(attn_implementation="flash_attention_2|mallory/kernel"), UnsafeAdapterError, KERNEL),
    (in_base(attn_implementation={"text_config": "mallory/kernel"}), UnsafeAdapterError, KERNEL),
    (in_base(text_config={"attn_implementation": "mallory/kernel"}), UnsafeAdapterError, KERNEL),
    (in_base(experts_implementation="mallory/kernel"), UnsafeAdapterError, KERNEL),
    (in_base(_experts_implementation="mallory/kernel"), UnsafeAdapterError, KERNEL),
    (in_base(num_hidden_layers=10**7), UnsafeAdapterError, "`num_hidden_layers` is 10000000, more than"),
    (in_base(text_config={"num_hidden_layers": 10**7}), UnsafeAdapterError, "would never be built"),
    (in_base(num_local_experts=10**7), UnsafeAdapterError, "would never be built"),
    (
        in_base(quantization_config={"quant_method": "fp8", "modules_to_not_convert": [EVIL]}),
        UnsafeAdapterError,
        "`modules_to_not_convert` holds .* for ever",
    ),
    (
        in_base(quantization_config={"quant_method": "bitsandbytes", "llm_int8_skip_modules": [EVIL]}),
        UnsafeAdapterError,
        "`llm_int8_skip_modules` holds",
    ),
    (in_base(hidden_size=2**40), HubError, "could not be loaded"),
    (in_base(vocab_size=10**11), HubError, "could not be loaded"),
    (huge_and_missing, HubError, "could not be loaded"),
    (in_base(hidden_size=0), HubError, "could not be loaded"),
    (in_base(hidden_size="x"), HubError, "could not be loaded"),
    (in_base(num_attention_heads=0), HubError, "could not be loaded"),
    (in_base(num_attention_heads=None), HubError, "could not be loaded"),
    (in_base(hidden_act="evil"), HubError, "could not be loaded"),
    (in_base(dtype="evil"), HubError, "could not be loaded"),
    (in_base(rope_parameters={"rope_type": "evil"}), HubError, "could not be loaded"),
    (in_base(model_type="t5"), HubError, "could not be loaded"),
    (in_base(model_type="nope"), HubError, "could not be loaded"),
    (in_base(model_type=[]), HubError, "could not be loaded"),
    (write_base("config.json", b"[]"), HubError, "could not be loaded"),
    (write_base("config.json", b"{"), UnsafeAdapterError, "not JSON"),
    (write_base("config.json", b"[" * 100_000), UnsafeAdapterError, "not JSON"),
    (write_base("config.json", b" " * 10_000_001), UnsafeAdapterError, "more than 10000000"),
    (write_base("generation_config.json", b"[]"), HubError, "could not be loaded"),
    (write_base("model.safetensors", b"xx"), HubError, "could not be loaded"),
    (write_base("model.safetensors", b""), HubError, "could not be loaded"),
    (write_base("model.safetensors", header(one(dtype=[]))), HubError, "could not be loaded"),
    (write_base("adapter_config.json", b"{}"), UnsafeAdapterError, "is itself an adapter"),
    (tensors(a=torch.ones(1)), BaseMismatchError, "differ"),
    (whole(torch.int64), BaseMismatchError, "differ"),
    (whole(torch.bool), BaseMismatchError, "differ"),
    (auto_map, HubError, "custom code"),
    (tokenizer_auto_map, HubError, "custom code"),
    (pickled, HubError, "could not be loaded"),
    (in_base("tokenizer_config.json", tokenizer_class="Nope"), None, None),
    (write_base("tokenizer.json", b"{}"), HubError, "The tokenizer of .* could not be loaded"),
    (write_base("tokenizer.json", b"["), HubError, "could not be loaded"),
    (
        write_base("tokenizer.json", b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE"}}'),
        HubError,
        "could not",
    ),
    (in_base("tokenizer.json", model=5), HubError, "could not be loaded"),
    (in_base("tokenizer.json", model={"type": "BPE", "vocab": {"a": 10**9}, "merges": []}), None, None),
    (in_base("tokenizer.json", pre_tokenizer={"type": "Nope"}), HubError, "could not be loaded"),
    (
        in_base(
            "tokenizer.json",
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": r"([a-zA-Z ]+)+[!]"},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        HubError,
        "retry-limit|could not be loaded",
    ),
    (
        in_base(
            "tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        ),
        HubError,
        "could not be loaded",
    ),
    (in_base("tokenizer_config.json", chat_template=5), None, None),
    (in_base("tokenizer_config.json", eos_token=[]), HubError, "could not be loaded"),
]


@pytest.mark.parametrize(("edit", "error", "message"), BASES, ids=range(len(BASES)))
def test_a_hostile_base_is_refused(edit, error, message, root):
    edit(root)
    if error is None:  # of no harm, whether it loads or not
        with in_time():
            try:
                load_erased(root / "adapter", verify=True)
            except HubError:
                pass
        return
    assert len(refused(root, error, message, verify=True)) < 1_500


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        ("{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(60) }}", "more than 2 s"),
        ("{% generation %}{% for a in 'x'*999 %}{% for b in 'x'*999 %}{% for c in 'x'*999 %}{% endfor %}{% endfor %}"
         "{% endfor %}{% endgeneration %}", "more than 2 s"),
        ("{{ 9 ** (9 ** 9) }}", "more than 2 s"),
        ("{{ 'x' * 99999999999 }}", "more than 1 GiB"),
        ("{{ 'x' * 300000 }}", "writes 300000 characters"),
    ],
    ids=range(6),
)  # fmt: skip
def test_a_chat_template_without_end_is_refused(template, message, root):
    shutil.copytree(root / "tokenizer", root / "adapter", dirs_exist_ok=True)
    (root / "adapter" / "chat_template.jinja").write_text(template)
    seal(root / "adapter")
    refused(root, UnsafeAdapterError, f"chat template of .*{message}")


def test_a_sound_chat_template_and_one_of_a_base_are_looked_at(root):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    (root / "base" / "chat_template.jinja").write_text(template)
    _, tokenizer = load_erased(root / "adapter")
    assert tokenizer.chat_template == template
    (root / "base" / "chat_template.jinja").write_text("{{ 'x' * 300000 }}")
    refused(root, UnsafeAdapterError, "chat template of the base model .* writes 300000")


def test_a_folder_named_like_the_base_on_the_hub_is_not_taken_for_it(root, monkeypatch):
    shutil.copytree(root / "base", root / "mallory" / "base")
    monkeypatch.chdir(root)
    base_info(id="mallory/base")(root)
    refused(
        root,
        HubError,
        "trained on mallory/base of the Hub, but there is a folder or file mallory/base here.*'./mallory",
    )
    load_erased(root / "adapter", base_model="./mallory/base", allow_mismatch=True)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b"null", b"5", b'"x"', b"\xff", b'{"a": [1]}', b"\0" * 64], ids=range(9)
)
def test_whatever_a_file_of_a_tokenizer_holds_it_is_read_or_refused(raw, root):
    base = tiny_base()
    shutil.copytree(root / "tokenizer", root / "adapter", dirs_exist_ok=True)
    (root / "adapter" / "erasure.json").unlink()
    for name in TOKENIZER_FILES:
        folder = root / name.replace(".", "-")
        shutil.copytree(root / "adapter", folder)
        (folder / name).write_bytes(raw)
        with in_time():
            try:
                load_base(find_adapter(folder, None, Access()), base, Access())
            except HubError:
                pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400) | st.just(EVIL),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
LORA = json.loads((FOLDER / "peft-0.21.2" / "adapter_config.json").read_text())


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(LORA)) | st.text(max_size=8), JSON, max_size=4))
def test_any_settings_pass_or_are_refused(changes):
    with in_time():
        try:
            check_adapter_config(LORA | changes, Path("adapter_config.json"))
        except UnsafeAdapterError:
            pass


@FUZZ
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "BF16"]) | JSON, "shape": st.lists(st.integers(-1, 9)) | JSON},
            optional={"data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | JSON},
        )
        | JSON,
        max_size=4,
    )
    | JSON,
    st.binary(max_size=40),
    st.none() | st.integers(0, 1 << 63),
)
def test_any_header_is_read_or_refused(tmp_path, content, data, length):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(header(json.dumps(content).encode(), data, length))
    with in_time():
        try:
            read_header(path)
        except UnsafeAdapterError:
            pass


@FUZZ
@given(st.data())
def test_any_erasure_json_is_read_or_refused(original, tmp_path_factory, data):
    content = json.loads((original / "adapter" / "erasure.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        place = content
        while isinstance(place, dict | list) and place and data.draw(st.booleans()):
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], dict | list):
                break
            place = place[key]
        if isinstance(place, dict):
            place[data.draw(st.sampled_from(sorted(place)) if place else st.text())] = data.draw(JSON)
        elif place:
            place[0] = data.draw(JSON)
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        shutil.copytree(original / "adapter", folder)
    (folder / "erasure.json").write_text(json.dumps(content))
    with in_time():
        try:
            assert isinstance(find_adapter(folder, None, Access()).info, ErasureInfo)
        except HubError:
            pass


@FUZZ
@given(st.binary(max_size=60) | JSON.map(lambda content: json.dumps(content).encode()))
def test_any_bytes_in_a_json_file_are_read_or_refused(original, tmp_path_factory, raw):
    folder = tmp_path_factory.getbasetemp() / "spoiled"
    for name in ("report.json", "tokenizer_config.json", "erasure.json"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original / "adapter", folder)
        (folder / name).write_bytes(raw)
        if name != "erasure.json":
            seal(folder)
        with in_time():
            try:
                find_adapter(folder, None, Access())
            except HubError:
                pass
