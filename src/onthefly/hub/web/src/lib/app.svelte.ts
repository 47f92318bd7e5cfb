// What the pages share: which store and session, the runs, and how a command is given.

import { ApiError, commanded, get, inStore } from './api'
import { live } from './live.svelte'
import { colourAt } from './colours'
import { number, plain, short } from './format'
import { counted, verdict } from './reports'
import type { Command, Event, Finding, Graph, Metric, Run, Session, Store } from './types'

export const PAGES = [
  { id: 'overview', title: 'Overview', key: '1' },
  { id: 'charts', title: 'Charts', key: '2' },
  { id: 'runs', title: 'Runs', key: '3' },
  { id: 'samples', title: 'Samples', key: '4' },
  { id: 'merge', title: 'Merge', key: '5' },
  { id: 'checkpoints', title: 'Checkpoints', key: '6' },
  { id: 'reports', title: 'Reports', key: '7' },
  { id: 'log', title: 'Log', key: '8' },
] as const

export type PageId = (typeof PAGES)[number]['id']

export interface Toast {
  id: number
  kind: 'good' | 'bad' | 'wait'
  text: string
}

export interface ForkRequest {
  indices?: number[]
  about?: string
  /** From this checkpoint instead of the present state. */
  checkpoint?: { id: number; run: string; step: number }
}

const RARE = ['command', 'newRun', 'runTransition', 'tested', 'generation', 'undo', 'inexact', 'scanned']

class App {
  page: PageId = $state('overview')
  ready = $state(false)
  failed: string | null = $state(null)
  now = $state(Date.now() / 1000)
  runs: Run[] = $state.raw([])
  graph: Graph = $state.raw({ nodes: [], edges: [] })
  metrics: Metric[] = $state.raw([])
  commands: Command[] = $state.raw([])
  pending: { id: number; kind: string; since: number }[] = $state([])
  toasts: Toast[] = $state([])
  chosen: number | null = $state(null)
  /** Runs that are marked: what is compared, charted or merged. */
  marked: string[] = $state([])
  selectedRun: string | null = $state(null)
  dialog: 'fork' | 'help' | 'palette' | 'stop' | 'reset' | null = $state(null)
  fork: ForkRequest = $state.raw({})

  #places = $derived(new Map(this.runs.map((run, place) => [run.name, place])))
  #opening = 0
  #busy = new Map<string, { again: boolean }>()

  get store(): string {
    return live.store ?? ''
  }

  /** The session that buttons and keys are about. */
  get session(): Session | null {
    const sessions = live.sessions
    const mine = sessions.find((session) => session.id === this.chosen)
    if (mine) return mine
    const alive = sessions.filter((session) => session.alive)
    return alive.at(-1) ?? sessions.at(-1) ?? null
  }

  /** What a run is doing: as its session says, if one is on it. */
  stateOf(run: string): string {
    const session = live.sessions.find((one) => one.alive && one.run === run)
    return session?.status ?? this.runs.find((one) => one.name === run)?.status ?? ''
  }

  get storeView(): Store | undefined {
    return live.stores.find((store) => store.id === live.store)
  }

  get metricNames(): string[] {
    return [...new Set(this.metrics.map((metric) => metric.name))].sort(byImportance)
  }

  async start(): Promise<void> {
    this.#readAddress()
    window.addEventListener('hashchange', () => this.#readAddress())
    setInterval(() => {
      if (!document.hidden) this.now = Date.now() / 1000
    }, 1000)
    live.start()
    for (let tries = 0; ; tries++) {
      try {
        const stores = await get<Store[]>('/stores')
        live.stores = stores
        let kept: string | null = null
        try {
          kept = localStorage.getItem('store')
        } catch {
          // storage is forbidden: the first store, then
        }
        const first = stores.find((store) => store.id === kept) ?? stores[0]
        if (first) await this.open(first.id)
        this.failed = null
        this.ready = true
        return
      } catch (error) {
        this.failed = said(error)
        await new Promise((done) => setTimeout(done, Math.min(1000, 100 * 2 ** tries)))
      }
    }
  }

  /** Go over to another store. Where that cannot be done, this one stays, and it is said. */
  async change(store: string): Promise<void> {
    try {
      await this.open(store)
    } catch (error) {
      this.toast('bad', `The store cannot be opened: ${said(error)}`, 9)
    }
  }

  async open(store: string): Promise<void> {
    const mine = ++this.#opening
    // Saves are many: what matters more would be behind them, out of sight. All is asked for at once: it is what a first page waits for.
    const [page, rare, metrics] = await Promise.all([
      get<{ events: Event[]; cursor: string }>(inStore(store, '/events?newest=600')),
      get<{ events: Event[] }>(inStore(store, `/events?newest=1000&${RARE.map((kind) => `kind=${kind}`).join('&')}`)),
      get<Metric[]>(inStore(store, '/metrics')),
    ])
    const events = [...new Map([rare, page].flatMap((one) => one.events).map((event) => [event.id, event])).values()]
    events.sort((a, b) => a.time - b.time || a.session - b.session || a.seq - b.seq)
    if (mine !== this.#opening) return // another one was chosen meanwhile
    try {
      localStorage.setItem('store', store)
    } catch {
      // then it is asked for again
    }
    this.runs = []
    this.graph = { nodes: [], edges: [] }
    this.metrics = []
    this.commands = []
    this.marked = []
    this.chosen = null
    this.selectedRun = null
    live.follow(store, events, page.cursor)
    await Promise.all([this.refreshRuns(metrics), this.refreshCommands()])
  }

  refreshRuns = (known?: Metric[]): Promise<void> =>
    this.#once('runs', async () => {
      const store = this.store
      const metrics = known ?? (await get<Metric[]>(inStore(store, '/metrics')))
      known = undefined
      const names = [...new Set(metrics.map((metric) => metric.name))].sort(byImportance).slice(0, 8)
      const query = new URLSearchParams(names.length ? { metrics: names.join(',') } : {})
      const [runs, graph] = await Promise.all([
        get<Run[]>(inStore(store, `/runs?${query}`)),
        get<Graph>(inStore(store, '/graph')),
      ])
      if (store !== this.store) return
      this.runs = runs
      this.graph = graph
      this.metrics = metrics
    })

  refreshCommands = (): Promise<void> =>
    this.#once('commands', async () => {
      const store = this.store
      const commands = await get<Command[]>(inStore(store, '/commands?limit=60&without=showSamples'))
      if (store === this.store) this.commands = commands
    })

  /** Not more often than about once a second, and again when it was asked for meanwhile. */
  async #once(what: string, task: () => Promise<void>): Promise<void> {
    const running = this.#busy.get(what)
    if (running) {
      running.again = true
      return
    }
    const mine = { again: false }
    this.#busy.set(what, mine)
    try {
      await task()
    } catch (error) {
      if (!(error instanceof ApiError)) throw error
      mine.again ||= error.status === 0 || error.status === 503
    }
    setTimeout(() => {
      this.#busy.delete(what)
      if (mine.again) void this.#once(what, task)
    }, 800)
  }

  colour(run: string): string {
    return colourAt(this.place(run))
  }

  /** The place of a run in the order in which runs were made: it has the same colour on each page, today and tomorrow. */
  place(run: string): number {
    return this.#places.get(run) ?? this.#places.size
  }

  go(page: PageId): void {
    this.page = page
    if (location.hash !== `#/${page}`) history.pushState(null, '', `#/${page}`)
  }

  #readAddress(): void {
    const name = location.hash.replace(/^#\//, '')
    const page = PAGES.find(({ id }) => id === name)
    if (page) this.page = page.id
  }

  mark(run: string, on = !this.marked.includes(run)): void {
    this.marked = on ? [...this.marked.filter((name) => name !== run), run] : this.marked.filter((name) => name !== run)
  }

  openFork(request: ForkRequest = {}): void {
    this.fork = request
    this.dialog = 'fork'
  }

  toast(kind: Toast['kind'], text: string, seconds = 5): number {
    const id = ++counter
    this.toasts = [...this.toasts.slice(-3), { id, kind, text }]
    if (seconds > 0) setTimeout(() => this.untoast(id), seconds * 1000)
    return id
  }

  untoast(id: number): void {
    this.toasts = this.toasts.filter((toast) => toast.id !== id)
  }

  /** Give a command to the session. Its answer, or null after an error, which is then shown. */
  async command(kind: string, body: Record<string, unknown> = {}): Promise<Command | null> {
    const session = this.session
    if (!session) {
      this.toast('bad', 'There is no session to give this to.')
      return null
    }
    return this.give(kind, `/sessions/${session.id}/commands/${kind}`, body)
  }

  async give(kind: string, path: string, body: Record<string, unknown>): Promise<Command | null> {
    const id = ++counter
    this.pending = [...this.pending, { id, kind, since: Date.now() / 1000 }]
    try {
      const command = await commanded(this.store, path, body, () => void this.refreshCommands())
      if (command.status === 'failed') {
        this.toast('bad', `${TITLES[kind] ?? kind}: ${command.error?.message ?? 'failed'}`, 9)
        return null
      }
      if (!this.showsItself(kind)) this.toast(command.result?.refused ? 'bad' : 'good', outcome(command))
      return command
    } catch (error) {
      this.toast('bad', `${TITLES[kind] ?? kind}: ${said(error)}`, 9)
      return null
    } finally {
      this.pending = this.pending.filter((one) => one.id !== id)
      void this.refreshCommands()
    }
  }

  /** Whether the page that is open shows how far such a command is, and what comes of it. */
  showsItself(kind: string): boolean {
    return this.page === 'reports' && ['report', 'cancelReport'].includes(kind)
  }

  pauseOrResume(): void {
    const session = this.session
    if (!session?.alive) return
    void this.command(session.status === 'paused' ? 'resume' : 'pause')
  }
}

let counter = 0

export const said = (error: unknown): string => (error instanceof Error ? error.message : String(error))

const counts = (count: number, what: string): string => `${number(count)} ${what}${count === 1 ? '' : 's'}`

function byImportance(a: string, b: string): number {
  const rank = (name: string) => (name === 'loss' ? 0 : /^val_/.test(name) ? 1 : /loss|acc/.test(name) ? 2 : 3)
  return rank(a) - rank(b) || a.localeCompare(b)
}

export const TITLES: Record<string, string> = {
  pause: 'Pause',
  resume: 'Resume',
  stop: 'Stop',
  saveCheckpoint: 'Save',
  pinCheckpoint: 'Pin',
  removeCheckpoint: 'Remove checkpoint',
  loadCheckpoint: 'Load',
  resetSession: 'Reset',
  testRun: 'Test',
  set: 'Set',
  scanSamples: 'Scan',
  showSamples: 'Show',
  cancelScan: 'Cancel scan',
  adoptScan: 'Adopt scan',
  subset: 'Subset',
  forkRun: 'Fork',
  mergeRuns: 'Merge',
  switchRun: 'Switch',
  undo: 'Undo',
  report: 'Report',
  cancelReport: 'Cancel report',
  exportSubset: 'Export',
}

/** What a command asked for, in few words. */
export function asked(command: Command): string {
  const a = command.arguments
  const values = (found: unknown) =>
    Object.entries((found ?? {}) as Record<string, unknown>)
      .map(([name, value]) => `${name} = ${plain(value)}`)
      .join(', ')
  const parts: string[] = []
  if (command.kind === 'set')
    parts.push(values(a.values) + (a.hold ? ' (held)' : '') + (a.release ? ' (released)' : ''))
  if (command.kind === 'forkRun') {
    if (a.name) parts.push(String(a.name))
    if (values(a.values)) parts.push(values(a.values))
    if (a.recipe) parts.push(recipeText(a.recipe, command.cut))
    if (a.beside) parts.push('beside')
  }
  if (command.kind === 'subset' && a.recipe) parts.push(recipeText(a.recipe, command.cut))
  if (command.kind === 'switchRun') parts.push(String(a.run))
  if (command.kind === 'testRun' || command.kind === 'scanSamples') parts.push(`${a.data} data`)
  if (command.kind === 'showSamples') parts.push(`${(a.indices as unknown[]).length} ${a.data} samples`)
  if (command.kind === 'report') parts.push(String(a.report))
  if (command.kind === 'loadCheckpoint' && a.hash) parts.push(short(String(a.hash)))
  if (command.kind === 'mergeRuns') {
    parts.push(`${(a.parents as unknown[]).length} parents`, String((a.strategies as string[]).join(', ')))
    if (a.commit) parts.push(`commit ${a.commit}`)
  }
  return parts.filter(Boolean).join(' · ')
}

/** A recipe in few words. `cut` has the length of each list of which it holds the beginning alone, by its place. */
export function recipeText(recipe: unknown, cut: Record<string, number> = {}, place = 'arguments.recipe'): string {
  if (recipe === null || typeof recipe !== 'object') return plain(recipe)
  const r = recipe as Record<string, unknown>
  for (const [name, sign] of Object.entries({ and: '&', or: '|', minus: '−' })) {
    const parts = r[name]
    if (!Array.isArray(parts)) continue
    const told = parts.map((part, at) => [part, recipeText(part, cut, `${place}.${name}.${at}`)])
    return told.map(([part, text]) => ('select' in part ? text : `(${text})`)).join(` ${sign} `)
  }
  if (r.select === 'indices')
    return `${number(cut[`${place}.indices`] ?? (r.indices as unknown[]).length)} samples by hand`
  if (typeof r.select === 'string')
    return `${r.select}(${Object.entries(r)
      .filter(([name]) => name !== 'select')
      .map(([, value]) => plain(value))
      .join(', ')})`
  return JSON.stringify(recipe)
}

/** What came of a command, in few words. */
export function outcome(command: Command): string {
  if (command.status === 'queued') return 'waiting for the next step'
  if (command.status === 'failed') return command.error?.message ?? 'failed'
  const r = command.result ?? {}
  const at = command.step === null ? '' : ` at step ${number(command.step)}`
  switch (command.kind) {
    case 'pause':
      return `Paused${at}`
    case 'resume':
      return `Training on${at ? ' from' + at.slice(3) : ''}`
    case 'saveCheckpoint':
      return `Saved${at}${r.hash ? ` · ${short(String(r.hash))}` : ''}`
    case 'testRun':
      return `Tested${at}: ${Object.entries(r)
        .filter(
          ([name, value]) =>
            typeof value === 'number' && !['samples', 'seconds', 'size', 'step', 'epoch'].includes(name),
        )
        .map(([name, value]) => `${name} ${number(value)}`)
        .join(', ')}`
    case 'set': {
      const changed = (r.changed ?? []) as { name: string; before: unknown; after: unknown }[]
      return `${changed.map((c) => `${c.name} ${plain(c.before)} → ${plain(c.after)}`).join(', ') || 'Set'}${at}`
    }
    case 'forkRun':
      return `${r.run ?? 'A new run'} forked${r.parent ? ` from ${r.parent}` : ''}${at}${r.samples ? ` on ${number(r.samples)} of ${number(r.of)} samples` : ''}`
    case 'switchRun':
    case 'loadCheckpoint':
      return `Now on ${r.run ?? 'the checkpoint'}${at}`
    case 'scanSamples':
      return `${number(r.samples)} ${r.data} samples scanned, mean loss ${number(r.loss)}`
    case 'mergeRuns':
      if (r.refused) return 'Nothing was committed: it would be worse than the best parent'
      return r.run
        ? `${r.run} merged by ${plain(r.strategy ?? r.committed ?? 'the best')}`
        : counts((r.candidates as unknown[])?.length ?? 0, 'merge') + ' judged'
    case 'report':
      return `Report on ${plain(r.kind)}: ${verdict(counted((r.findings ?? []) as Finding[]))}`
    case 'cancelReport':
      return 'The report ended early'
    case 'resetSession':
      return `Reset to the beginning`
    case 'stop':
      return `Stopped${at}`
    default:
      return `${TITLES[command.kind] ?? command.kind} done${at}`
  }
}

export const app = new App()
