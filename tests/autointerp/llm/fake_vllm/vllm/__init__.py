"""What stands in for vLLM in tests: a package of its name whose server is started, looked at and stopped as the real
one is. How it behaves is in the environment variable ``FAKE_VLLM``; see ``entrypoints/openai/api_server.py``."""
