// What the hub says; docs/api.md describes it.

export type Status = 'running' | 'paused' | 'ended' | 'killed'

export interface Store {
  id: string
  path: string
  name: string
  projects: string[]
  sessions: number
  runs: number
}

export interface Session {
  id: number
  project: string
  run: string
  pid: number
  host: string
  status: string
  outcome: string | null
  alive: boolean
  step: number
  epoch: number
  loss: number | null
  started: number
  heartbeat: number
  ended: number | null
  inexact: unknown[]
  config: Record<string, unknown>
  environment: Record<string, unknown>
  resumable: boolean
  speed: number | null
  memory: number | null
}

export interface Parent {
  run: string
  hash: string
}

export interface Run {
  name: string
  project: string
  kind: string
  created: number
  status: string
  generation: number
  parents: Parent[]
  base: Record<string, unknown> | null
  archived: number | null
  step: number
  epoch: number
  session: number | null
  tags: string[]
  latest: Record<string, number | null>
}

export interface RunDetail extends Run {
  manifest: Record<string, unknown> | null
  children: string[]
  ancestors: string[]
  path: { run: string; first_step: number; last_step: number | null }[]
  notes: string
  metrics: string[]
  selection: { digest: string; count: number; length: number; recipe: unknown } | null
  settings: Record<string, unknown>
  problems?: string[]
}

export interface GraphNode {
  id: string
  kind: string
  status: string
  step: number
  created: number
  archived: number | null
  /** How many resets there were. */
  generation: number
  /** What it was begun on; null for all samples. */
  subset: { count: number; length: number; recipe: unknown } | null
}

export interface GraphEdge {
  from: string
  to: string
  kind: string
  hash: string
  step: number | null
  changes: Record<string, unknown>
  strategy: string | null
}

export interface Graph {
  nodes: GraphNode[]
  edges: GraphEdge[]
}

export interface Event {
  id: string
  session: number
  seq: number
  run: string | null
  generation: number | null
  step: number | null
  epoch: number | null
  time: number
  kind: string
  data: Record<string, unknown>
}

export interface Command {
  id: string
  number: number
  session: number
  kind: string
  arguments: Record<string, unknown>
  created: number
  status: 'queued' | 'done' | 'failed'
  result: Record<string, unknown> | null
  error: { type: string; message: string } | null
  step: number | null
  epoch: number | null
  finished: number | null
  /** `cli`, `python`, `dashboard`, `api`; null where it was not recorded. */
  door: string | null
  asker: string | null
  run: string | null
  /** How long those lists are that are not here whole, by their places. */
  cut: Record<string, number>
}

export type Severity = 'note' | 'warning' | 'error'

export interface Finding {
  report: string
  severity: Severity
  what: string
  where: string
  since: number | null
  before: boolean
  evidence: Record<string, number | string | null>
  advice: string
}

export type Cell = number | string | null

export interface ReportTable {
  title: string
  columns: { name: string; unit: string }[]
  rows: Cell[][]
  drawn: string
  left_out: number
}

export interface Report {
  kind: string
  run: string
  generation: number
  step: number
  epoch: number
  live: boolean
  first_step: number | null
  last_step: number | null
  checkpoint: string | null
  checkpoint_step: number | null
  findings: Finding[]
  facts: string[]
  missing: string[]
  latest: Record<string, [number, number | string][]>
  tables: ReportTable[]
  worst: Severity | null
}

export interface ReportHead {
  id: string
  number: number
  session: number
  time: number
  door: string | null
  asker: string | null
  kind: string
  run: string
  generation: number
  step: number
  epoch: number
  first_step: number | null
  last_step: number | null
  counts: Record<Severity, number>
  worst: Severity | null
  first: Finding | null
}

export interface WholeReport extends ReportHead {
  report: Report
  checkpoints: { hash: string; step: number }[]
}

export interface Checkpoint {
  id: number
  run: string
  generation: number
  step: number
  epoch: number
  time: number
  path: string
  hash: string
  size: number
  reason: string
  pinned: boolean
  metrics: Record<string, number | null>
  session: number
  kept: string[]
  on_disk: boolean
  evicted: number | null
  evicted_reason: string | null
}

export interface Metric {
  run: string
  name: string
  points: number
  first_step: number
  last_step: number
}

export interface Scan {
  id: number
  run: string
  generation: number
  step: number
  epoch: number
  time: number
  checkpoint: string
  data: string
  columns: string[]
  length: number
  seconds: number
  session: number
}

export type XAxis = 'step' | 'epoch' | 'time' | 'relative'

export interface ChartQuestion {
  series: [string, string][]
  points: number
  x: XAxis
  from: number | null
  to: number | null
  grid: boolean
  joined: boolean
}

export interface ChartAnswer {
  /** One for all lines, or one for each. */
  xs: Float64Array[]
  ys: Float64Array[]
  series: { run: string; name: string; points: number; resolution: number; version: string }[]
}
