"""Reference and erased model answer the same prompt side by side, with the probability of the concept at every token."""

from .answers import Answer, AnswerToken, ChatConcept, ErasureChat, load_chat_concept


__all__ = ["Answer", "AnswerToken", "ChatConcept", "ErasureChat", "load_chat_concept"]
