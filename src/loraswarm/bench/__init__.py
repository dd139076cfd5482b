"""Measuring servers: workloads made from a seed, requests sent and timed, results and tables.

Knows any OpenAI-compatible endpoint over HTTP and our own engine in process, but neither the server
nor the LLM class. Its modules import no torch. Read by commands/bench and benchmarks/.
"""
