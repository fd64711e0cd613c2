"""Names of the files that are published, and of no others."""

from .info import INFO_FILE


CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REPORT = "report.json"
REPORT_PLOT = "report.png"
ATTACKS_PLOT = "attacks.png"
INSIDE_PLOT = "inside.png"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

PUBLISHED_FILES = frozenset(
    {
        CARD,
        ADAPTER_CONFIG,
        ADAPTER_WEIGHTS,
        INFO_FILE,
        REPORT,
        REPORT_PLOT,
        ATTACKS_PLOT,
        INSIDE_PLOT,
        *TOKENIZER_FILES,
    }
)
