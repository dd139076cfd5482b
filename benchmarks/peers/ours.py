"""LoRASwarm itself, as its users start it: `loraswarm serve` from this source tree.

python benchmarks/peers/ours.py --workloads base,uniform
"""

from __future__ import annotations

import importlib.metadata
import sys

from peer import BASE_NAME, KV_BYTES, HttpPeer, Setting
from workloads import Workload


class Ours(HttpPeer):
    """As much room for K/V as vLLM is given, and for the adapters, which lie in the same pool.

    The pool is one mapping that is touched as it is used.
    """

    name = "loraswarm"
    lazy_room_bytes = KV_BYTES

    def install(self, setting: Setting) -> None:
        """It is there: the benchmark runs on the same interpreter."""

    def versions(self, setting: Setting) -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("loraswarm", "torch")}

    def command(self, setting: Setting, workload: Workload, port: int) -> list[str]:
        adapters = setting.swarm.adapters
        adapter_bytes = sum(file.stat().st_size for file in adapters.glob("*/*.safetensors"))
        command = [sys.executable, "-m", "loraswarm", "serve", str(setting.swarm.model)]
        command += ["--adapters", str(adapters), "--served-model-name", BASE_NAME]
        command += ["--port", str(port), "--num-threads", str(setting.num_threads)]
        command += ["--max-model-len", "2048", "--no-prefix-caching"]
        return [*command, "--pool-bytes", str(KV_BYTES + adapter_bytes)]


if __name__ == "__main__":
    from session import main

    main([Ours()])
