"""vLLM itself needs a GPU: a stand-in with the names and arguments of its public source runs the model by transformers."""

import json
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from elm_trainer import ModelPair, evaluate_erasure
from elm_trainer.evaluation.fluency import VllmGenerator, end_tokens, generate_answers
from elm_trainer.evaluation.tables import write_markdown


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    detokenize: bool = True


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    """Writes greedily, one prompt after the other; `served` is the pair of models that it finds at its paths."""

    model: str
    dtype: str
    seed: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    enable_lora: bool
    max_loras: int
    max_lora_rank: int
    served = None

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        assert len(prompts) == len(sampling_params)
        with self.served.use("reference" if lora_request is None else "erased") as model, torch.no_grad():
            return [self._write(model, *both) for both in zip(prompts, sampling_params, strict=True)]

    @staticmethod
    def _write(model, prompt, parameters):
        ids = list(prompt["prompt_token_ids"])
        new = []
        reason = "length"
        for _ in range(parameters.max_tokens):
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
            if new[-1] in parameters.stop_token_ids:
                reason = "stop"
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new), finish_reason=reason)])


@pytest.fixture
def vllm(monkeypatch):
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.__version__, package.LLM, package.SamplingParams = "0.0.1", LLM, SamplingParams
    request.LoRARequest = LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "rank_pattern": {"layers.1": 20}}))
    return str(folder)


def test_vllm_writes_what_transformers_does_with_and_without_the_adapter(
    vllm, adapter, adapted_model, tokenizer, monkeypatch
):
    pair = ModelPair(adapted_model)
    monkeypatch.setattr(LLM, "served", pair)
    generator = VllmGenerator("org/base", adapter)
    ends = end_tokens(adapted_model, tokenizer)
    prompts = ["What is the capital of Peru?", "Oslo", "Tell me about Lima and its people."]
    texts = {}
    for side in ("reference", "erased"):
        found = generator(side, tokenizer, prompts, max_new_tokens=5, temperature=0.0, seed=None, ends=ends)
        with pair.use(side) as model:
            assert found == generate_answers(model, tokenizer, prompts, max_new_tokens=5)
        texts[side] = found.texts
    assert texts["reference"] != texts["erased"]


def test_an_answer_loses_its_end_token_and_a_cut_one_is_told(vllm, adapter, adapted_model, tokenizer, monkeypatch):
    monkeypatch.setattr(LLM, "served", ModelPair(adapted_model))
    generator = VllmGenerator("org/base", adapter)
    asked = {"max_new_tokens": 4, "temperature": 0.0, "seed": None}
    [whole] = generator("erased", tokenizer, ["Oslo"], ends=[], **asked).texts
    first = tokenizer(whole)["input_ids"][0]

    found = generator("erased", tokenizer, ["Oslo"], ends=[first], **asked)

    assert (found.texts, found.truncated) == ([""], [False])
    assert generator("erased", tokenizer, ["Oslo"], ends=[], **asked).truncated == [True]


def test_each_prompt_is_sampled_with_its_own_seed_among_the_likeliest_tokens(vllm, adapter, tokenizer, monkeypatch):
    given = []

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        given.extend([*sampling_params, lora_request])
        output = SimpleNamespace(token_ids=(1,), finish_reason="length")
        return [SimpleNamespace(outputs=[output])] * len(prompts)

    monkeypatch.setattr(LLM, "generate", generate)
    generator = VllmGenerator("org/base", adapter)
    generator("erased", tokenizer, ["a", "b"], max_new_tokens=7, temperature=0.7, seed=3, ends=[2])

    assert given == [
        SamplingParams(temperature=0.7, top_k=50, seed=3, stop_token_ids=[2], max_tokens=7, detokenize=False),
        SamplingParams(temperature=0.7, top_k=50, seed=4, stop_token_ids=[2], max_tokens=7, detokenize=False),
        LoRARequest("erased", 1, adapter),
    ]
    # Room is made for the largest rank of all layers.
    assert generator._model == LLM("org/base", "auto", 0, 1, 0.4, True, 1, 32)


def test_the_report_says_who_wrote_and_does_not_take_one_for_the_other(
    vllm, adapter, adapted_model, tokenizer, suite, monkeypatch, tmp_path
):
    monkeypatch.setattr(LLM, "served", ModelPair(adapted_model))
    options = {"measures": ["open-answers", "greedy-fluency"], "reference_dir": tmp_path / "reference"}

    usual = evaluate_erasure(adapted_model, None, suite, tokenizer, **options)
    written = []
    call = VllmGenerator.__call__
    monkeypatch.setattr(
        VllmGenerator,
        "__call__",
        lambda self, side, *args, **kw: written.append(side) or call(self, side, *args, **kw),
    )
    other = evaluate_erasure(
        adapted_model, None, suite, tokenizer, generator=VllmGenerator("org/base", adapter), **options
    )

    assert usual["generator"].startswith("transformers 5.") and other["generator"] == "vllm 0.0.1"
    assert sorted(written) == ["erased"] * 2 + ["reference"] * 2
    assert other["samples"] == usual["samples"] and other["figures"] == usual["figures"]
    write_markdown(tmp_path / "report.md", other)
    assert "\nFree answers were written by vllm 0.0.1.\n" in (tmp_path / "report.md").read_text()


def test_what_vllm_cannot_serve_is_refused(vllm, adapter, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has the rank 600, and vLLM serves up to 512: use `elm shrink`"):
        VllmGenerator("org/base", adapter, rank=600)
    with pytest.raises(ValueError, match="'org/adapter', which is no folder of an adapter here"):
        VllmGenerator("org/base", "org/adapter")
    monkeypatch.setattr("elm_trainer.evaluation.fluency.processes_and_rank", lambda: (2, 0))
    with pytest.raises(ValueError, match="vLLM in a launch of 2 processes: start one"):
        VllmGenerator("org/base", adapter)


def test_without_vllm_the_error_says_what_to_install(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM cannot be imported .*pip install vllm"):
        VllmGenerator("org/base", adapter)
