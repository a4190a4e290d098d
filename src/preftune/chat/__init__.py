"""A conversation with a tuned model and the model it was tuned from, drawn with the same random numbers."""

from preftune.chat.session import REFERENCE, TUNED, Session, open_session

__all__ = ["REFERENCE", "TUNED", "Session", "open_session"]
