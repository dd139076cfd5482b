"""Images of adapters in host memory, ready to be copied into pages, within a budget. No torch.

Decides which image leaves; neither loads nor copies any. A shared matrix is kept once, as long as
an image uses it. Called by the engine's thread alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from loraswarm.adapters.adapter import SharedMatrix
from loraswarm.core.sequence import AdapterKey
from loraswarm.memory.costs import CostModel
from loraswarm.memory.eviction import EvictionOrder
from loraswarm.memory.image import AdapterImage


class HostCache:
    """Images by key. `total_evictions` counts those that left for want of room.

    A protected image never leaves, so `num_bytes` may exceed `capacity_bytes` while many are. Who
    sets `touched` to a set finds there those that have come or left since.
    """

    def __init__(
        self, capacity_bytes: int, order: EvictionOrder[AdapterKey], costs: CostModel
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self.total_evictions = 0
        self._order = order
        self._costs = costs
        self._images: dict[AdapterKey, AdapterImage] = {}
        self._matrices: dict[SharedMatrix, np.ndarray] = {}
        self._users: dict[SharedMatrix, set[AdapterKey]] = {}
        self._protections: Counter[AdapterKey] = Counter()
        self._dropped: set[AdapterKey] = set()
        self.touched: set[AdapterKey] | None = None

    @property
    def num_images(self) -> int:
        return len(self._images)

    def keys(self) -> tuple[AdapterKey, ...]:
        return tuple(self._images)

    def has(self, key: AdapterKey) -> bool:
        return key in self._images

    def get(self, key: AdapterKey) -> AdapterImage | None:
        """The image, with every shared matrix that it uses."""
        return self._images.get(key)

    def shared_matrices(self) -> frozenset[SharedMatrix]:
        """Those at hand, which need not be packed again."""
        return frozenset(self._matrices)

    def missing(self, image: AdapterImage) -> tuple[SharedMatrix, ...]:
        """Shared matrices that neither the image nor the cache has: it was packed without them,
        and they have left since. It must be loaded anew, with them."""
        return tuple(
            matrix
            for matrix in image.info.shared_matrices()
            if matrix not in image.shared and matrix not in self._matrices
        )

    def put(self, image: AdapterImage) -> list[AdapterKey]:
        """Keep an image that lacks nothing (`missing`), evicting others to make room.

        Returns those that left: the image itself is one if it is larger than everything and not
        protected. An image whose key is here already is ignored, since the bytes are the same.
        """
        key = image.info.key
        if key in self._images:
            return []
        assert not self.missing(image), f"shared matrices of {key} are not at hand"
        self._add(image)
        if not self._protections[key]:
            self._offer(key)
            if self._bytes_of([key]) > self.capacity_bytes:
                self._evict(key)
                return [key]
        return self._make_room()

    def touch(self, key: AdapterKey) -> None:
        """A request began to use it, or waits for it."""
        self._order.touch(key)
        if key in self._order:
            self._offer(key)

    def protect(self, key: AdapterKey) -> None:
        """Keep the image, here or still to come, until `unprotect`; counted."""
        self._protections[key] += 1
        self._order.withdraw(key)

    def unprotect(self, key: AdapterKey) -> list[AdapterKey]:
        """Take back one protection. Returns those that leave now, if there is too little room."""
        assert self._protections[key] > 0, f"unprotect of an image that is not protected: {key}"
        self._protections[key] -= 1
        if self._protections[key]:
            return []
        del self._protections[key]
        if key in self._dropped:
            self._dropped.remove(key)
            self._remove(key)
        elif key in self._images:
            self._offer(key)
            return self._make_room()
        return []

    def drop(self, key: AdapterKey) -> bool:
        """Remove an image because its adapter is unloaded: now (True), or when it is no longer
        protected (False)."""
        if self._protections[key]:
            self._dropped.add(key)
            return False
        self._remove(key)
        return True

    def may_load(self, num_bytes: int, num_loading_bytes: int) -> bool:
        """Whether an image of this size could be kept beside protected ones and loads under way.

        Always if nothing is protected and nothing loads, so that no adapter is too large to serve.
        """
        protected = [key for key in self._protections if key in self._images]
        if not protected and num_loading_bytes == 0:
            return True
        taken = self._bytes_of(protected) + num_loading_bytes
        return taken + num_bytes <= self.capacity_bytes

    def check(self) -> None:
        """Assert that bytes are exact, and that the shared matrices of images are there."""
        assert self.num_bytes == self._bytes_of(self._images)
        assert self._matrices.keys() == self._users.keys()
        for matrix, users in self._users.items():
            assert users == {
                key for key, image in self._images.items() if matrix in image.info.shared_matrices()
            }
            assert all(self._images[key].shared[matrix] is self._matrices[matrix] for key in users)
        assert all(count > 0 for count in self._protections.values())
        assert self._dropped <= self._protections.keys()

    def _bytes_of(self, keys: Iterable[AdapterKey]) -> int:
        """Of these images and of the matrices that they share, each once."""
        images = [self._images[key] for key in keys]
        matrices = {matrix for image in images for matrix in image.shared}
        own_bytes = sum(image.num_bytes for image in images)
        return own_bytes + sum(self._matrices[matrix].nbytes for matrix in matrices)

    def _add(self, image: AdapterImage) -> None:
        key = image.info.key
        shared = {}
        for matrix in image.info.shared_matrices():
            if matrix not in self._matrices:
                self._matrices[matrix] = image.shared[matrix]
                self._users[matrix] = set()
                self.num_bytes += image.shared[matrix].nbytes
            self._users[matrix].add(key)
            shared[matrix] = self._matrices[matrix]
        self._images[key] = replace(image, shared=shared)
        self.num_bytes += image.num_bytes
        self._touch(key)

    def _offer(self, key: AdapterKey) -> None:
        num_bytes = self._images[key].num_bytes
        self._order.offer(key, self._costs.adapter_s(num_bytes, is_in_host=False), num_bytes)

    def _make_room(self) -> list[AdapterKey]:
        """Evict until the rest fits or is protected."""
        evicted: list[AdapterKey] = []
        while self.num_bytes > self.capacity_bytes:
            key = self._order.lowest()
            if key is None:
                break
            self._evict(key)
            evicted.append(key)
        return evicted

    def _evict(self, key: AdapterKey) -> None:
        self._remove(key)
        self.total_evictions += 1

    def _remove(self, key: AdapterKey) -> None:
        """Forget an image, and matrices that it was the last to use."""
        image = self._images.pop(key, None)
        self._order.forget(key)
        if image is None:
            return
        self._touch(key)
        self.num_bytes -= image.num_bytes
        for matrix in image.shared:
            self._users[matrix].remove(key)
            if not self._users[matrix]:
                self.num_bytes -= self._matrices.pop(matrix).nbytes
                del self._users[matrix]

    def _touch(self, key: AdapterKey) -> None:
        if self.touched is not None:
            self.touched.add(key)
