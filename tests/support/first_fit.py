"""Packing said plainly, one tree at a time: what `dpo_jax.data.packing` does for many steps at once."""


def balanced(sizes, shards):
    """Numbers of the bundles of each device."""
    loads, parts = [0] * shards, [[] for _ in range(shards)]
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        device = loads.index(min(loads))
        parts[device].append(number)
        loads[device] += sizes[number]
    return parts


def first_fit(bundles, numbers, rows, length, scored):
    """(bundle, micro-batch, row and start of each tree) of the numbered bundles (trees, scored), or None."""
    micros, places = [], []
    for number in numbers:
        trees, tokens = bundles[number]
        for micro in range(len(micros) + 1):
            if micro == len(micros):
                micros.append([[length] * rows, scored])
            free, left = micros[micro]
            found = _rows(trees, free) if tokens <= left else None
            if found is not None:
                break
            if free == [length] * rows and left == scored:
                return None
        micros[micro][1] -= tokens
        starts = []
        for tree, row in zip(trees, found, strict=True):
            starts.append(length - free[row])
            free[row] -= tree
        places.append((number, micro, found, starts))
    return places


def _rows(trees, free):
    free, rows = list(free), [0] * len(trees)
    for tree in sorted(range(len(trees)), key=lambda t: -trees[t]):
        row = next((r for r, room in enumerate(free) if room >= trees[tree]), None)
        if row is None:
            return None
        free[row] -= trees[tree]
        rows[tree] = row
    return rows
