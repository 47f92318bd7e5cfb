// The lineage as a layered graph, from left to right.

import dagre from '@dagrejs/dagre'
import type { GraphEdge, GraphNode } from './types'

export const NODE = { width: 176, height: 46 }

export interface Placed {
  nodes: { id: string; x: number; y: number }[]
  edges: { from: string; to: string; path: string; label: [number, number] }[]
  width: number
  height: number
}

/** What stays to be seen when these are collapsed: a run goes when each of its parents is gone or collapsed. */
export function visible(nodes: GraphNode[], edges: GraphEdge[], collapsed: Set<string>): Set<string> {
  const parents = new Map<string, string[]>()
  for (const edge of edges) parents.set(edge.to, [...(parents.get(edge.to) ?? []), edge.from])
  const found = new Map<string, boolean>()
  const isVisible = (id: string, depth = 0): boolean => {
    const known = found.get(id)
    if (known !== undefined) return known
    found.set(id, true) // should there be a circle, it ends
    const above = parents.get(id) ?? []
    const answer =
      above.length === 0 || depth > 5000 || above.some((one) => !collapsed.has(one) && isVisible(one, depth + 1))
    found.set(id, answer)
    return answer
  }
  return new Set(nodes.map((node) => node.id).filter((id) => isVisible(id)))
}

/** How many runs come from a run, directly or not. */
export function descendants(edges: GraphEdge[], id: string): Set<string> {
  const children = new Map<string, string[]>()
  for (const edge of edges) children.set(edge.from, [...(children.get(edge.from) ?? []), edge.to])
  const found = new Set<string>()
  const queue = [id]
  for (let next = queue.pop(); next !== undefined; next = queue.pop())
    for (const child of children.get(next) ?? [])
      if (!found.has(child)) {
        found.add(child)
        queue.push(child)
      }
  return found
}

export function place(nodes: GraphNode[], edges: GraphEdge[]): Placed {
  const graph = new dagre.graphlib.Graph({ multigraph: true })
  graph.setGraph({ rankdir: 'LR', nodesep: 14, ranksep: 64, marginx: 20, marginy: 20 })
  graph.setDefaultEdgeLabel(() => ({}))
  const there = new Set(nodes.map((node) => node.id))
  for (const node of nodes) graph.setNode(node.id, { ...NODE })
  const known = edges.filter((edge) => there.has(edge.from) && there.has(edge.to))
  known.forEach((edge, number) => graph.setEdge(edge.from, edge.to, {}, String(number)))
  dagre.layout(graph)
  const size = graph.graph()
  return {
    nodes: nodes.map(({ id }) => {
      const { x, y } = graph.node(id)
      return { id, x: x - NODE.width / 2, y: y - NODE.height / 2 }
    }),
    edges: known.map((edge) => {
      const a = graph.node(edge.from)
      const b = graph.node(edge.to)
      const [x0, y0, x1, y1] = [a.x + NODE.width / 2, a.y, b.x - NODE.width / 2, b.y]
      const bend = Math.max(24, (x1 - x0) / 2)
      return {
        from: edge.from,
        to: edge.to,
        path: `M${x0} ${y0}C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`,
        label: [x1 - 12, y1 - 5],
      }
    }),
    width: size.width ?? 0,
    height: size.height ?? 0,
  }
}
