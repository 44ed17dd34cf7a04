"""A vLLM server as a child process, on this machine only, for as long as a command needs it.

In: the model and the options of the flags. Out: the address of a server that answers.
Must not import: the client.
"""
