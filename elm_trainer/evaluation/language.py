"""Whether answers keep the language of their prompts."""

from collections.abc import Sequence

from py3langid.langid import MODEL_FILE, LanguageIdentifier


# Odds of the likeliest language over the second below which a text is undecided.
_LEAST_ODDS = 4.0
# A name or two, which belong to no language.
_LEAST_LETTERS = 12


class LanguageDetector:
    """Tells languages by byte n-grams (langid.py's model, which comes with the package `py3langid`)."""

    def __init__(self):
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(self, text: str) -> str | None:
        """ISO 639 code of a text's language, or `None` for a text too short or too ambiguous to tell.

        Babble may come out as some language, as undecided, or as `"zxx"`, which means no language.
        """
        # In other scripts a few letters say as much as a word here, and the script itself tells.
        if text.isascii() and sum(character.isalpha() for character in text) < _LEAST_LETTERS:
            return None
        (language, first), (_, second), *_ = self._identifier.rank(text)
        return language if first >= _LEAST_ODDS * second else None

    def kept(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """Whether each answer is in the language of its prompt; `None` where either's language is undecided.

        Empty answers, names and single words are undecided: count them apart, neither as kept nor as lost.

        Args:
            prompts (`Sequence[str]`): Prompts as a user would write them, without a chat template.
            answers (`Sequence[str]`): An answer to each.
        """
        asked = {prompt: self.detect(prompt) for prompt in set(prompts)}
        verdicts: list[bool | None] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            expected, found = asked[prompt], self.detect(answer)
            verdicts.append(None if expected is None or found is None else found == expected)
        return verdicts


def language_kept(prompts: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
    """[`LanguageDetector.kept`] without a detector at hand; loading one takes about a second."""
    return LanguageDetector().kept(prompts, answers)
