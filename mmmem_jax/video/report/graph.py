"""The entity graph laid out in pixels: what report.html.jinja draws of the schema's relations."""

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np

MAX_NODES = 30  # the most mentioned
WIDTH, HEIGHT, MARGIN_X, MARGIN_Y = 900, 520, 70, 40


def spring_layout(num_nodes: int, edges: np.ndarray) -> np.ndarray:
    """Positions [N, 2] in [0, 1] of nodes joined by edges [E, 2]; the same picture always."""
    graph = nx.Graph()
    graph.add_nodes_from(range(num_nodes))
    graph.add_edges_from(map(tuple, edges.tolist()))
    if num_nodes < 2:
        return np.full((num_nodes, 2), 0.5)
    placed = nx.forceatlas2_layout(graph, max_iter=200, seed=0)  # its gravity keeps parts together
    at = np.array([placed[i] for i in range(num_nodes)])
    low, high = at.min(0), at.max(0)
    return (at - low) / np.maximum(high - low, 1e-9)


def draw_graph(
    entities: Sequence[Any], relations: Sequence[Any], together: Mapping[tuple[int, int], int]
) -> dict | None:
    """Nodes and edges among the most mentioned entities, in pixels of WIDTH x HEIGHT.

    Args:
      entities: EntityViews.
      relations: RelationViews.
      together: kept clips that show both of two slots, by (lower slot, higher slot).

    Returns:
      None where there is no entity.
    """
    if not entities:
        return None
    shown = sorted(entities, key=lambda entity: (-entity.mentions, entity.slot))[:MAX_NODES]
    place = {entity.slot: i for i, entity in enumerate(shown)}
    found: dict[tuple[int, int], str] = {}
    for relation in relations:
        ends = tuple(sorted((relation.subject, relation.target)))
        if ends[0] != ends[1] and place.keys() >= set(ends):
            found.setdefault(ends, relation.name)
    pairs = np.array([[place[a], place[b]] for a, b in found], int).reshape(-1, 2)
    room = np.array([WIDTH - 2 * MARGIN_X, HEIGHT - 2 * MARGIN_Y])
    at = (spring_layout(len(shown), pairs) * room + (MARGIN_X, MARGIN_Y)).round(1).tolist()
    most = max(entity.mentions for entity in shown)
    nodes = [
        {
            "slot": entity.slot,
            "name": entity.name,
            "mentions": entity.mentions,
            "grounded": len(entity.episodes),
            "x": x,
            "y": y,
            "radius": round(6 + 14 * (entity.mentions / max(most, 1)) ** 0.5, 1),
        }
        for entity, (x, y) in zip(shown, at, strict=True)
    ]
    edges = [
        {
            "ends": (nodes[place[a]], nodes[place[b]]),
            "name": name,
            "clips": together.get((a, b), 0),
            "width": round(1 + min(together.get((a, b), 0), 40) ** 0.5 * 0.8, 1),
        }
        for (a, b), name in found.items()
    ]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "nodes": nodes,
        "edges": edges,
    }
