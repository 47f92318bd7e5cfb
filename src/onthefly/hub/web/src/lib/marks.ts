// What happened to a run, as marks on its curves.

import type { Event, Run } from './types'
import { number, plain } from './format'

export interface Mark {
  run: string
  step: number
  time: number
  kind: 'save' | 'change' | 'branch' | 'reset' | 'test' | 'inexact'
  text: string
}

const record = (value: unknown): Record<string, unknown> =>
  value !== null && typeof value === 'object' ? (value as Record<string, unknown>) : {}

export function markOf(event: Event): Mark | null {
  if (event.run === null || event.step === null) return null
  const about = { run: event.run, step: event.step, time: event.time }
  const data = event.data
  switch (event.kind) {
    case 'checkpointSaved':
      return { ...about, kind: 'save', text: `saved (${plain(data.reason)})` }
    case 'tested':
      return { ...about, kind: 'test', text: `tested: loss ${number(data.loss)}` }
    case 'command': {
      const changed = Array.isArray(data.changed) ? (data.changed as Record<string, unknown>[]) : []
      const said = changed.map((one) => `${plain(one.name)} ${plain(one.before)} → ${plain(one.after)}`).join(', ')
      if (data.kind === 'resetSession') return { ...about, kind: 'reset', text: 'reset' }
      return { ...about, kind: 'change', text: said || plain(data.kind) }
    }
    case 'generation':
      return { ...about, kind: 'reset', text: `reset (generation ${plain(event.generation)})` }
    case 'newRun': {
      if (data.kind === 'root') return null
      const parents = Array.isArray(data.parents) ? data.parents.map(plain).join(' + ') : ''
      const values = Object.entries(record(data.values)).map(([name, value]) => `${name} = ${plain(value)}`)
      return { ...about, kind: 'branch', text: [`${plain(data.kind)} of ${parents}`, ...values].join(', ') }
    }
    case 'undo':
      return { ...about, kind: 'reset', text: 'undo' }
    case 'inexact':
      return { ...about, kind: 'inexact', text: 'not exact from here' }
    default:
      return null
  }
}

/** Marks of these runs, and on their parents' curves where they branch off. */
export function marksOf(events: Event[], runs: Run[], shown: string[]): Mark[] {
  const wanted = new Set(shown)
  const found: Mark[] = []
  for (const event of events) {
    const mark = markOf(event)
    if (!mark) continue
    if (wanted.has(mark.run)) found.push(mark)
    else if (mark.kind === 'branch' && Array.isArray(event.data.parents)) {
      const parent = event.data.parents.find((name) => typeof name === 'string' && wanted.has(name))
      if (parent) found.push({ ...mark, run: parent, text: `${mark.run}, ${mark.text}` })
    }
  }
  return found
}

/** What time since the start counts from on a run's curve: when it was made or, joined, its first ancestor. */
export function began(runs: Run[], name: string, joined: boolean): number | undefined {
  const run = runs.find((one) => one.name === name)
  const parent = joined ? run?.parents[0] : undefined
  return parent ? (began(runs, parent.run, true) ?? run?.created) : run?.created
}

export type Anchor = [step: number, epoch: number]

/** The epoch of a step, with its fraction, from steps whose epochs are known; NaN where none is. */
export function epochAt(anchors: Anchor[], step: number): number {
  if (anchors.length === 0) return NaN
  const high = anchors.findIndex(([at]) => at >= step)
  if (high < 0) return anchors[anchors.length - 1][1]
  if (high === 0) return anchors[0][1]
  const [s0, e0] = anchors[high - 1]
  const [s1, e1] = anchors[high]
  return e0 + ((step - s0) * (e1 - e0)) / (s1 - s0)
}
