"""OpenAI's Responses API: bodies, translation to chat, answers, the store."""
