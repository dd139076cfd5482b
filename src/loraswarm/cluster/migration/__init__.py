"""Which open requests go to which other replica, with which adapters, when load is unbalanced.

`from_view` says when to solve and what; `greedy`, `ilp` and `pairs` solve; `objective` says for all
of them what a placement is worth, `bound` what none can be better than. Nothing here moves a
request: `cluster/moving` does.
"""
