"""A light client of an ergo-vqa server: ``Client(url).ask("street.jpg", "What does the red sign say?")``."""

from ergo_client._client import Answer, Client, RequestFailed, VisualTokens

__all__ = ["Answer", "Client", "RequestFailed", "VisualTokens"]
