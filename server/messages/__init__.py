"""Anthropic's Messages API: bodies, translation to chat, answers."""
