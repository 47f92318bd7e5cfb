// What single samples look like: asked of the live session, some at a time, and kept while the page is open.

import { app, said } from './app.svelte'
import { columns, commanded, inStore } from './api'
import { numbers } from './columns'

export interface Content {
  kind: string
  dtype: string
  shape: string
  label: string
  text: string
  height: number
  width: number
  channels: number
  pixels: Uint8Array | null
}

const MOST = 64 // in one command
const FEW = 16 // in one command, once it was seen that so many are not read in time
const LATE = 'not read: after' // how the session's answer begins for those
const KEPT = 3000
const QUIET = 200 // milliseconds without another wish, such as while a table is scrolled

class Contents {
  found: Map<number, Content> = $state.raw(new Map())
  /** Why there are none: the session cannot give them. */
  problem: string | null = $state(null)
  #of = ''
  #data = 'train'
  #length = 0
  #wanted: number[] = []
  #late = new Set<number>()
  #again = new Set<number>() // those that were late, and have been out of sight since
  #most = MOST
  #busy = false
  #timer: ReturnType<typeof setTimeout> | undefined

  /** Say whose samples are looked at. Others are forgotten. */
  open(store: string, session: number | null, data: string, length: number): void {
    const of = `${store} ${session} ${data} ${length}`
    if (of === this.#of) return
    this.#of = of
    this.#data = data
    this.#length = length
    this.#wanted = []
    this.#late.clear()
    this.#again.clear()
    this.#most = MOST
    this.found = new Map()
    this.problem = session === null ? 'no session is alive that could read the samples' : null
  }

  /** Say which samples are in sight. */
  want(indices: number[]): void {
    this.#wanted = indices
    // At once they would be late again, and hold up training each time.
    for (const one of this.#late) if (!indices.includes(one)) this.#again.add(one)
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => void this.#ask(), QUIET)
  }

  async #ask(): Promise<void> {
    if (this.#busy || this.problem !== null) return
    if (document.hidden) {
      document.addEventListener('visibilitychange', () => void this.#ask(), { once: true })
      return
    }
    const session = app.session
    const missing = this.#wanted
      .filter((index) => !this.found.has(index) || this.#again.has(index))
      .slice(0, this.#most)
    if (missing.length === 0 || !session?.alive) return
    const [of, store, length] = [this.#of, app.store, this.#length]
    this.#busy = true
    try {
      const path = `/sessions/${session.id}/commands/showSamples`
      const answer = await commanded(store, path, { data: this.#data, indices: missing }, () => undefined)
      if (answer.status === 'failed') throw new Error(answer.error?.message ?? 'the session refused')
      const key = answer.result?.shown
      if (typeof key !== 'string') throw new Error('the session does not know how to')
      const got = await columns(inStore(store, `/samples/shown/${key}`))
      if (of !== this.#of) return
      if (got.meta.length !== length) throw new Error('the live session has another data set than the one shown here')
      const next = new Map(this.found)
      const words = (name: string) => got.get(name) as string[]
      const [kind, dtype, shape, label, text] = ['kind', 'dtype', 'shape', 'label', 'text'].map(words)
      const [index, height, width, channels] = ['index', 'height', 'width', 'channels'].map((name) =>
        numbers(got, name)!,
      )
      const pixels = numbers(got, 'pixels')
      const row = pixels ? pixels.length / index.length : 0
      for (let i = 0; i < index.length; i++) {
        this.#again.delete(index[i])
        this.#late.delete(index[i])
        if (kind[i] === 'error' && text[i].startsWith(LATE)) {
          this.#late.add(index[i])
          this.#most = FEW
        }
        const size = height[i] * width[i] * channels[i]
        // A copy: the whole answer would be kept for the sake of one sample in it.
        const own = size > 0 && pixels ? (pixels.slice(i * row, i * row + size) as Uint8Array) : null
        next.set(index[i], {
          ...{ kind: kind[i], dtype: dtype[i], shape: shape[i], label: label[i], text: text[i] },
          ...{ height: height[i], width: width[i], channels: channels[i], pixels: own },
        })
      }
      for (const old of next.keys()) {
        if (next.size <= KEPT) break
        next.delete(old)
      }
      this.found = next
    } catch (error) {
      if (of === this.#of) this.problem = said(error)
    } finally {
      this.#busy = false
    }
    void this.#ask()
  }

  /** Try again after a problem. */
  again(): void {
    this.problem = null
    void this.#ask()
  }
}

export const contents = new Contents()
