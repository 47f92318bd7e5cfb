// One WebSocket: what the store says now. A frame is acknowledged after it was drawn; after a gap everything is resumed from the last cursor drawn.

import { unpack, numbers, type Columns } from './columns'
import type { ChartAnswer, ChartQuestion, Event, Session, Store } from './types'

interface StoreFrame {
  sessions?: Session[]
  runs?: number
  events?: Event[]
  cursor?: string
  more?: boolean
  charts?: Record<string, { series: ChartAnswer['series']; columns: string }>
  error?: { type: string; message: string } | null
}

interface Subscription {
  question: ChartQuestion
  told: (answer: ChartAnswer) => void
}

const KEPT = 3000 // events in memory
const PACE = 120 // milliseconds between two acknowledgements, at least

export const backOff = (tries: number): number => Math.min(1000, 100 * 2 ** tries)

/** Not too many: the oldest saves go first, then the oldest of all. */
export function trimmed(events: Event[]): Event[] {
  if (events.length <= KEPT) return events
  let spare = events.length - KEPT + 300
  const left = events.filter((event) => !(event.kind.startsWith('checkpoint') && spare-- > 0))
  return left.slice(-KEPT)
}

class Live {
  state: 'connecting' | 'open' | 'lost' | 'signedOut' = $state('connecting')
  lostSince: number = $state(0)
  store: string | null = $state(null)
  stores: Store[] = $state.raw([])
  sessions: Session[] = $state.raw([])
  events: Event[] = $state.raw([])
  runs: number | null = $state(null)
  storeError: string | null = $state(null)
  frames = 0

  #socket: WebSocket | null = null
  #tries = 0
  #cursor: string | null = null
  #seen = new Set<string>()
  #charts = new Map<string, Subscription>()
  #said = ''
  #timer: ReturnType<typeof setTimeout> | undefined
  #reopening: ReturnType<typeof setTimeout> | undefined
  #acknowledged = 0

  /** Follow another store; what was known of the one before is forgotten. `events` came up to `cursor`. */
  follow(store: string, events: Event[], cursor: string): void {
    this.store = store
    this.sessions = []
    this.runs = null
    this.events = events
    this.#seen = new Set(events.map((event) => event.id))
    this.#cursor = cursor
    this.storeError = null
    if (this.#socket) this.#close()
    this.#open()
  }

  start(): void {
    document.addEventListener('visibilitychange', () => {
      if (document.hidden) this.#close()
      else if (!this.#socket && this.store) {
        this.#tries = 0
        this.#open()
      }
    })
    window.addEventListener('online', () => {
      this.#tries = 0
    })
  }

  /** A chart to be kept up to date until the function that comes back is called. */
  chart(id: string, question: ChartQuestion, told: (answer: ChartAnswer) => void): () => void {
    const mine = { question, told }
    this.#charts.set(id, mine)
    this.#sayCharts()
    return () => {
      if (this.#charts.get(id) !== mine) return
      this.#charts.delete(id)
      this.#sayCharts()
    }
  }

  #sayCharts(): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => {
      if (this.#socket?.readyState !== WebSocket.OPEN || !this.store) return
      const charts = [...this.#charts]
        .filter(([, { question }]) => question.series.length > 0)
        .slice(0, 64)
        .map(([id, { question }]) => ({ id, ...question }))
      const text = JSON.stringify({ type: 'charts', store: this.store, charts })
      if (text === this.#said) return
      this.#said = text
      this.#socket.send(text)
    }, 30)
  }

  #open(): void {
    clearTimeout(this.#reopening)
    if (document.hidden || !this.store) return
    const scheme = location.protocol === 'https:' ? 'wss' : 'ws'
    const socket = new WebSocket(`${scheme}://${location.host}/api/v1/live`)
    socket.binaryType = 'arraybuffer'
    this.#socket = socket
    socket.onopen = () => {
      this.#tries = 0
      this.state = 'open'
      this.#said = ''
      socket.send(JSON.stringify({ type: 'follow', store: this.store, cursor: this.#cursor }))
      this.#sayCharts()
    }
    socket.onmessage = ({ data }) => {
      if (typeof data === 'string') {
        const message = JSON.parse(data)
        if (message.type === 'welcome') this.stores = message.stores
        else if (message.type === 'error') console.warn('the hub:', message.error.message)
      } else this.#take(socket, unpack(data))
    }
    socket.onclose = () => {
      if (this.#socket !== socket) return
      this.#socket = null
      if (this.state !== 'lost' && this.state !== 'signedOut') {
        this.state = 'lost'
        this.lostSince = Date.now() / 1000
      }
      this.#reopening = setTimeout(() => void this.#again(), backOff(this.#tries++))
    }
  }

  /** A refused socket tells no reason, so after some tries it is asked for in another way. */
  async #again(): Promise<void> {
    if (this.#tries % 8 === 4) {
      try {
        const answer = await fetch('/api/v1/hub')
        this.state = answer.status === 401 ? 'signedOut' : 'lost'
      } catch {
        this.state = 'lost'
      }
    }
    this.#open()
  }

  #close(): void {
    const socket = this.#socket
    this.#socket = null
    clearTimeout(this.#reopening)
    socket?.close()
  }

  #take(socket: WebSocket, frame: Columns): void {
    const meta = frame.meta as { type: string; frame: number; stores: Record<string, StoreFrame> }
    requestAnimationFrame(() => {
      if (this.#socket !== socket) return
      const mine = this.store ? meta.stores[this.store] : undefined
      if (mine) this.#draw(mine, frame)
      this.frames++
      const wait = Math.max(0, this.#acknowledged + PACE - performance.now())
      setTimeout(() => {
        this.#acknowledged = performance.now()
        if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: 'drawn', frame: meta.frame }))
      }, wait)
    })
  }

  #draw(mine: StoreFrame, frame: Columns): void {
    if (mine.error !== undefined) this.storeError = mine.error?.message ?? null
    if (mine.sessions) this.sessions = mine.sessions
    if (mine.runs !== undefined) this.runs = mine.runs
    for (const [id, { series, columns }] of Object.entries(mine.charts ?? {})) {
      const subscription = this.#charts.get(id)
      if (!subscription) continue
      const grid = numbers(frame, `${columns}x`)
      const column = (name: string) => (numbers(frame, columns + name) ?? new Float64Array()) as Float64Array
      const xs = grid ? [grid as Float64Array] : series.map((_, place) => column(`${place}.x`))
      const ys = series.map((_, place) => column(grid ? `${place}` : `${place}.y`))
      subscription.told({ xs, ys, series })
    }
    if (mine.events?.length) {
      const fresh = mine.events.filter((event) => !this.#seen.has(event.id))
      for (const event of fresh) this.#seen.add(event.id)
      if (fresh.length) this.events = trimmed([...this.events, ...fresh])
    }
    if (mine.cursor) this.#cursor = mine.cursor
  }
}

export const live = new Live()
