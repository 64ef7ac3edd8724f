"""Processes of a run that are threads of this one, with a store of their own."""

import threading
from concurrent.futures import ThreadPoolExecutor

from dpo_jax.errors import UserError
from dpo_jax.processes.here import Here

MANY = 64


class Store:
    """What is used of JAX's store, in this process."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise RuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_try_get(self, key):
        with self.changed:
            if key not in self.values:
                raise RuntimeError("NOT_FOUND")
            return self.values[key]

    def key_value_dir_get(self, key):
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]


def everywhere(work, count=MANY):
    """The result, or the error, of every process."""
    store = Store()

    def one(process):
        try:
            return work(Here(store, process, count))
        except UserError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
