// What each report looks at and costs, and how what it found is said.

import { number } from './format'
import type { Cell, Finding, ReportTable, Severity } from './types'

export interface Kind {
  id: string
  title: string
  about: string
  /** What it takes of a live training that is looked into for so many steps. */
  cost: (steps: number, doubleRun: boolean) => string
}

const slower = (steps: number) => `${number(steps)} steps, up to 2× slower`

export const KINDS: Kind[] = [
  { id: 'health', title: 'Health', about: 'All of these on one page, and the course of the losses', cost: slower },
  {
    id: 'numerics',
    title: 'Numerics',
    about: 'NaN and inf traced to their place, overflow, how far a step moves each weight',
    cost: slower,
  },
  {
    id: 'activations',
    title: 'Activations',
    about: 'Range of every layer’s outputs, dead and saturated units',
    cost: slower,
  },
  {
    id: 'gradients',
    title: 'Gradients',
    about: 'Norms by parameter, vanishing, exploding, clipping, noise scale',
    cost: slower,
  },
  {
    id: 'throughput',
    title: 'Throughput',
    about: 'Where a step’s time goes: data, forward, backward, optimizer, saves',
    cost: (steps) => `${number(steps)} steps, hardly slower`,
  },
  {
    id: 'determinism',
    title: 'Determinism',
    about: 'What cannot be exact: flags, generators, operations; a double run',
    cost: (_, doubleRun) => (doubleRun ? '3 steps, a second process' : '3 steps, hardly slower'),
  },
  {
    id: 'distribution',
    title: 'Distribution',
    about: 'Parameters, random state and data across ranks, by hash',
    cost: () => 'one look between two steps',
  },
]

export const titleOf = (kind: string): string => KINDS.find((one) => one.id === kind)?.title ?? kind

export type Counts = Record<Severity, number>

export function counted(findings: Finding[]): Counts {
  const counts: Counts = { error: 0, warning: 0, note: 0 }
  for (const finding of findings) counts[finding.severity]++
  return counts
}

/** `1 error, 2 warnings`, or `nothing wrong`. */
export function verdict(counts: Counts): string {
  const words = (['error', 'warning', 'note'] as const)
    .filter((severity) => counts[severity] > 0)
    .map((severity) => `${counts[severity]} ${severity}${counts[severity] > 1 ? 's' : ''}`)
  return words.join(', ') || 'nothing wrong'
}

/** `since step 5`, or, when it was so from the first look on, `at or before step 5`. */
export function since(finding: Finding): string {
  if (finding.since === null) return ''
  return finding.before ? `at or before step ${number(finding.since)}` : `since step ${number(finding.since)}`
}

const NOT_FINITE: Record<string, string> = { NaN: 'NaN', Infinity: '∞', '-Infinity': '−∞' }

/** Whether it is a number, or stands for one that JSON does not have. */
export const isNumeric = (value: Cell): boolean =>
  typeof value === 'number' || (typeof value === 'string' && value in NOT_FINITE)

export function cell(value: Cell, unit: string): string {
  if (typeof value !== 'number') return value === null ? '–' : (NOT_FINITE[value] ?? value)
  if (value === 0) return '0'
  if (unit === 'share')
    return value > 0 && value < 0.001 ? '< 0.1 %' : `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`
  if (unit === 's') {
    if (value >= 1) return `${value.toFixed(2)} s`
    return value >= 1e-3 ? `${(value * 1e3).toFixed(1)} ms` : `${(value * 1e6).toFixed(0)} µs`
  }
  return number(value, 3)
}

/** A bar of a row: where it begins and how long it is, in parts of the whole width; null for what is no number. */
export type Bar = [from: number, length: number] | null

const SHORTEST = 0.02 // so that what is there can be seen

/** The bars of a table, one for each row. */
export function bars(table: ReportTable): Bar[] {
  const first = table.columns.findIndex((_, place) => place > 0 && table.rows.some((row) => finite(row[place])))
  if (first < 0) return table.rows.map(() => null)
  const values = table.rows.map((row) => row[first])
  const known = values.filter(finite)
  if (table.drawn === 'range') {
    const ends = table.rows.map((row) => [row[first], row[first + 1]] as const)
    const all = [0, ...ends.flat().filter(finite)]
    const [low, high] = [Math.min(...all), Math.max(...all)]
    const at = (value: number) => (high > low ? (value - low) / (high - low) : 0)
    return ends.map(([from, to]) =>
      finite(from) && finite(to) ? [at(from), Math.max(at(to) - at(from), 0.005)] : null,
    )
  }
  if (table.drawn === 'log') {
    const logs = known.filter((value) => value > 0).map(Math.log10)
    const [low, high] = [Math.min(...logs), Math.max(...logs)]
    return values.map((value) => {
      if (!finite(value)) return null
      if (value <= 0) return [0, 0]
      return [0, high > low ? SHORTEST + ((1 - SHORTEST) * (Math.log10(value) - low)) / (high - low) : 1]
    })
  }
  const most = table.columns[first].unit === 'share' ? 1 : Math.max(...known.map(Math.abs))
  return values.map((value) => (finite(value) ? [0, most > 0 ? Math.min(1, Math.abs(value) / most) : 0] : null))
}

const finite = (value: unknown): value is number => typeof value === 'number' && Number.isFinite(value)
