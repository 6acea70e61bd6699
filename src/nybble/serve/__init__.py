"""The engine behind an HTTP server that speaks OpenAI's API.

Knows requests, tokens and texts; not how a model computes. Needs starlette, uvicorn and
prometheus_client, of the extra `serve`.
"""
