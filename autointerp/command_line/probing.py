"""The command llm: find out what a language-model server can do."""

from __future__ import annotations

import asyncio

from autointerp.command_line.ending import finish
from autointerp.command_line.options import Output, Server, llm_options, takes_groups
from sae.common.commands import command
from sae.common.errors import BadInput


@takes_groups
def llm(*, server: Server, output: Output) -> None:
    """Find out what a language-model server can do, by three small requests, and how `score` would ask it.

    `score` and `explain` then do not ask again. The exit code is 0 if something is missing that has a substitute.

    vLLM, llama.cpp and Ollama on this machine, and OpenAI:

    \b
    python cli.py llm --llm-url http://127.0.0.1:8000/v1
    python cli.py llm --llm-url http://127.0.0.1:8080
    python cli.py llm --llm-url http://127.0.0.1:11434/v1 --llm-model qwen2.5:7b
    python cli.py llm --llm-url https://api.openai.com/v1 --llm-model gpt-4o-mini

    A model that thinks first can often be asked not to:

    \b
    python cli.py llm --llm-url http://127.0.0.1:8000/v1 \\
        --llm-body '{"chat_template_kwargs": {"enable_thinking": false}}'
    """
    from autointerp.report.stages import server_page
    from autointerp.report.terminal import print_page
    from autointerp.scoring.probing import probe_servers

    options = llm_options(server)
    if not options.is_named:
        raise BadInput("llm needs a server: give --llm-url (such as http://127.0.0.1:8000/v1), --llm-model or --vllm")
    found = asyncio.run(probe_servers(options, output.root)).as_dict()
    found["next"] = command(output.root, "explain", *options.list_words())
    finish(output.as_json, "llm", lambda: found, lambda: print_page(server_page(found)))
