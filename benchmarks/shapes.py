"""Sizes of a model and of an adapter, from which benchmarks build models and predictions count."""

from dataclasses import dataclass

from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model of Llama's kind."""

    hidden: int  # width of the residual stream
    intermediate: int  # width within the feed-forward part
    layers: int
    heads: int  # of the queries
    kv_heads: int  # of keys and values
    vocab: int  # rows of the embeddings
    tied: bool = True  # whether the LM head shares the embeddings
    head: int | None = None  # width of a head; of all of them that of the residual stream by default

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ModelShape":
        """The sizes that a model's config names."""
        head = getattr(config, "head_dim", None)
        return cls(
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings,
            head if head != config.hidden_size // config.num_attention_heads else None,
        )  # fmt: skip

    @property
    def q_width(self) -> int:
        """Width of queries, and of what attention gives."""
        return self.head * self.heads if self.head else self.hidden

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.q_width * self.kv_heads // self.heads

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        h, q, kv, i = self.hidden, self.q_width, self.kv_width, self.intermediate
        return dict(zip(PROJECTIONS, [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)], strict=True))

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        norms = 2 * self.layers * self.hidden + self.hidden
        return self.layers * self.layer_parameters + norms + (1 if self.tied else 2) * self.vocab * self.hidden

    def model(self, pad_token_id: int | None = None) -> LlamaForCausalLM:
        """A model of these sizes with random weights."""
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=self.hidden,
                intermediate_size=self.intermediate,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                head_dim=self.head,
                vocab_size=self.vocab,
                tie_word_embeddings=self.tied,
                pad_token_id=pad_token_id,
            )
        )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on matrices of some layers."""

    rank: int
    layers: tuple[int, ...]  # the adapted ones
    alpha: int = 16
    dropout: float = 0.0  # of its inputs
    targets: tuple[str, ...] = PROJECTIONS  # the adapted matrices

    def lora(self) -> LoraConfig:
        """The adapter's configuration for PEFT."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            layers_to_transform=list(self.layers),
            target_modules=list(self.targets),
            task_type="CAUSAL_LM",
        )

    def parameters(self, shape: ModelShape) -> int:
        """Weights of the adapter on a model of a shape."""
        per_layer = sum(self.rank * sum(shape.projections[name]) for name in self.targets)
        return len(self.layers) * per_layer
