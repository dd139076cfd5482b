"""Several engines behind one front: who serves a request, who holds an adapter, what moves.

`view` is what every decision is made from; what decides knows neither Ray nor tensors, so that
simulate runs it unchanged. Ray is in `ray_replicas` alone.
"""
