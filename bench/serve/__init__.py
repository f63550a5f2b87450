"""HTTP load for OpenAI-style servers: `python -m bench.serve --url http://127.0.0.1:8000 --concurrency 32`.

It knows nothing of mlxd: any server that speaks /v1/chat/completions or /v1/completions can be measured.
The client is asyncio on uvloop with httptools' response parser and one msgspec decode a frame, so that one
core drives 256-500 streams without being what is measured; every result says how busy that core was.
"""
