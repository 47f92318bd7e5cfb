// The lineage as a layered graph, from left to right.

import dagre from '@dagrejs/dagre'
import type { GraphEdge, GraphNode } from './types'

export const NODE = { width: 184, height: 60 }

export interface Placed {
  nodes: { id: string; x: number; y: number }[]
  edges: { from: string; to: string; path: string; middle: [number, number]; end: [number, number] }[]
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

/** Which runs to fold, so that no more than `most` are seen: the oldest layers stay. None, where there are no more. */
export function folded(nodes: GraphNode[], edges: GraphEdge[], most: number): Set<string> {
  const found = new Set<string>()
  if (nodes.length <= most) return found
  const children = new Map<string, string[]>()
  for (const edge of edges) children.set(edge.from, [...(children.get(edge.from) ?? []), edge.to])
  const below = new Set(edges.map((edge) => edge.to))
  let layer = nodes.map((node) => node.id).filter((id) => !below.has(id))
  const seen = new Set(layer)
  while (layer.length > 0) {
    const next = [...new Set(layer.flatMap((id) => children.get(id) ?? []))].filter((id) => !seen.has(id))
    if (seen.size + next.length > most) {
      for (const id of seen) if (children.get(id)?.some((child) => !seen.has(child))) found.add(id)
      return found
    }
    for (const id of next) seen.add(id)
    layer = next
  }
  return found
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
  graph.setGraph({ rankdir: 'LR', nodesep: 16, ranksep: 104, marginx: 20, marginy: 20 })
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
    edges: known.map((edge, number) => {
      const a = graph.node(edge.from)
      const b = graph.node(edge.to)
      const start = { x: a.x + NODE.width / 2, y: a.y }
      const end = { x: b.x - NODE.width / 2, y: b.y }
      // A long edge goes around the nodes on its way: where it passes their layers, dagre has left it a place.
      const between = graph.edge(edge.from, edge.to, String(number)).points.slice(1, -1)
      const way = [start, ...between.filter(({ x }: { x: number }) => x > start.x + 8 && x < end.x - 8), end]
      const middle = way.length > 2 ? way[1] : { x: (start.x + end.x) / 2, y: (start.y + end.y) / 2 }
      return { from: edge.from, to: edge.to, path: curve(way), middle: [middle.x, middle.y], end: [end.x, end.y] }
    }),
    width: size.width ?? 0,
    height: size.height ?? 0,
  }
}

/** Through these points, level at each of them. */
function curve(way: { x: number; y: number }[]): string {
  const parts = [`M${way[0].x} ${way[0].y}`]
  for (let i = 1; i < way.length; i++) {
    const [p, q] = [way[i - 1], way[i]]
    const bend = Math.max(way.length === 2 ? 24 : 0, (q.x - p.x) / 2)
    parts.push(`C${p.x + bend} ${p.y} ${q.x - bend} ${q.y} ${q.x} ${q.y}`)
  }
  return parts.join('')
}
