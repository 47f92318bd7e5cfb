import { misfit, readOption, readSlices, sharedOptions } from '../src/lib/merging'
import { describe, expect, it } from 'vitest'
import { aim, arranged, moved } from '../src/lib/arrange'
import { numbers, unpack } from '../src/lib/columns'
import { bytes, duration, number } from '../src/lib/format'
import { descendants, folded, place, visible } from '../src/lib/layout'
import { epochAt, markOf, marksOf } from '../src/lib/marks'
import { condition, fuzzy, glob, nearest, smooth, ticks, typed, xRange, yRange } from '../src/lib/maths'
import { bars, cell, since, verdict } from '../src/lib/reports'
import type { Event, GraphEdge, GraphNode } from '../src/lib/types'

function packed(columns: Record<string, Float64Array | Int32Array | string[]>, meta: unknown): ArrayBuffer {
  const parts: Uint8Array[] = []
  let offset = 0
  const head = Object.entries(columns).map(([name, values]) => {
    const json = Array.isArray(values)
    const bytes = json ? new TextEncoder().encode(JSON.stringify(values)) : new Uint8Array(values.buffer)
    const type = json ? 'json' : values instanceof Float64Array ? 'f8' : 'i4'
    const about = { name, type, offset, length: values.length, width: 1, bytes: bytes.length }
    const size = Math.ceil(bytes.length / 8) * 8
    const padded = new Uint8Array(size)
    padded.set(bytes)
    parts.push(padded)
    offset += size
    return about
  })
  let text = JSON.stringify({ columns: head, meta })
  const size = Math.ceil(new TextEncoder().encode(text).length / 8) * 8
  text += ' '.repeat(size - new TextEncoder().encode(text).length)
  const all = new Uint8Array(8 + size + offset)
  all.set(new TextEncoder().encode('OTF1'))
  new DataView(all.buffer).setUint32(4, size, true)
  all.set(new TextEncoder().encode(text), 8)
  let at = 8 + size
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all.buffer
}

describe('columns', () => {
  it('reads what the hub packs', () => {
    const found = unpack(
      packed({ x: new Float64Array([1, NaN, 3]), i: new Int32Array([7]), t: ['é', '<b>'] }, { a: 'ü' }),
    )
    expect(found.names).toEqual(['x', 'i', 't'])
    expect(found.meta).toEqual({ a: 'ü' })
    expect(Array.from(numbers(found, 'x')!)).toEqual([1, NaN, 3])
    expect(Array.from(numbers(found, 'i')!)).toEqual([7])
    expect(found.get('t')).toEqual(['é', '<b>'])
    expect(numbers(found, 't')).toBeUndefined()
    expect(found.get('nothing')).toBeUndefined()
  })

  it('refuses what is none', () => {
    expect(() => unpack(new ArrayBuffer(16))).toThrow()
    expect(() => unpack(new ArrayBuffer(2))).toThrow()
  })
})

describe('numbers', () => {
  it('says numbers in few digits', () => {
    expect(number(0.000123)).toBe('1.23e−4')
    expect(number(12345)).toBe('12 345')
    expect(number(0.5)).toBe('0.5000')
    expect(number(null)).toBe('–')
    expect(number(NaN)).toBe('NaN')
    expect(bytes(400372)).toBe('400 kB')
    expect(duration(3725)).toBe('1 h 02 min')
  })

  it('takes what is typed for what is meant', () => {
    expect(typed('1e-3')).toBe(0.001)
    expect(typed('true')).toBe(true)
    expect(typed('null')).toBeNull()
    expect(typed('[0.9, 0.99]')).toEqual([0.9, 0.99])
    expect(typed('[0.9')).toBe('[0.9')
    expect(typed(' cosine ')).toBe('cosine')
  })

  it('finds by glob and by letters', () => {
    expect(['val_loss', 'loss', 'lr'].filter(glob('val_*'))).toEqual(['val_loss'])
    expect(['val_loss', 'loss', 'lr'].filter(glob('loss'))).toEqual(['val_loss', 'loss'])
    expect(['val_loss', 'loss', 'lr'].filter(glob('l?, nothing'))).toEqual(['lr'])
    expect(['a(b', 'a'].filter(glob('a(*'))).toEqual(['a(b'])
    expect(fuzzy('svc', 'Save a checkpoint')).not.toBeNull()
    expect(fuzzy('xyz', 'Save a checkpoint')).toBeNull()
  })
})

describe('curves', () => {
  it('smooths, from the first value on, and leaves gaps', () => {
    const found = smooth([4, 4, NaN, 8], 0.5)
    expect(found[0]).toBe(4)
    expect(found[1]).toBe(4)
    expect(found[2]).toBeNaN()
    expect(found[3]).toBeGreaterThan(4)
    expect(Array.from(smooth([1, 2], 0))).toEqual([1, 2])
  })

  it('is not flattened by one wild value', () => {
    const line = Array.from({ length: 500 }, (_, i) => Math.sin(i / 20))
    line[250] = 1e9
    const [low, high] = yRange([line], true, false)!
    expect(low).toBeLessThan(-1)
    expect(high).toBeLessThan(10)
    expect(yRange([line], false, false)![1]).toBeGreaterThan(1e8)
    expect(yRange([[NaN, Infinity]], true, false)).toBeNull()
    expect(yRange([[0, -1]], true, true)).toBeNull()
    expect(yRange([[3]], true, false)).toEqual([2.7, 3.3])
  })

  it('gives an axis more than its marks can be told apart in', () => {
    const [low, high] = yRange([[1e16, 1e16 + 2]], false, false)!
    expect(high - low).toBeGreaterThan(1e4)
    expect(xRange([5, 5 + 1e-14], null, null)).toEqual([4, 6 + 1e-14])
    expect(xRange(null, null, null)).toEqual([0, 1])
    expect(xRange(null, [7, 7], null)).toEqual([6, 8])
    expect(xRange([2, 4], [0, 9], null)).toEqual([2, 4])
    const [from, to] = xRange(null, [1e17, 1e17], null)
    expect(to - from).toBeGreaterThan(1e4)
  })

  it('begins no axis of logarithms at zero', () => {
    expect(xRange([0, 40], [0, 90], 1)).toEqual([1, 40])
    expect(xRange([-3, 0], [0, 90], 1)).toEqual([0.5, 2])
    expect(xRange([2, 4], [0, 90], 0.1)).toEqual([2, 4])
    expect(xRange(null, [0, 3], 0.1)).toEqual([0.1, 10])
    expect(xRange(null, null, 1)).toEqual([1, 10])
  })

  it('finds places', () => {
    expect(nearest([1, 5, 9], 6)).toBe(1)
    expect(nearest([1, 5, 9], 100)).toBe(2)
    expect(nearest([], 1)).toBe(0)
    expect(ticks(0, 10)).toEqual([0, 2, 4, 6, 8, 10])
  })

  it('knows the epoch of a step', () => {
    const anchors: [number, number][] = [
      [0, 0],
      [40, 1],
      [60, 2],
    ]
    expect([0, 20, 40, 50, 60, 80].map((step) => epochAt(anchors, step))).toEqual([0, 0.5, 1, 1.5, 2, 2])
    expect(epochAt([], 5)).toBeNaN()
  })
})

describe('marks', () => {
  const event = (kind: string, data: Record<string, unknown>, run = 'a'): Event => ({
    id: '1.1',
    session: 1,
    seq: 1,
    run,
    generation: 0,
    step: 5,
    epoch: 0,
    time: 9,
    kind,
    data,
  })

  it('says what was changed', () => {
    const mark = markOf(event('command', { kind: 'set', changed: [{ name: 'lr', before: 0.1, after: 0.01 }] }))
    expect(mark?.kind).toBe('change')
    expect(mark?.text).toBe('lr 0.1000 → 0.01000')
    expect(markOf(event('newRun', { kind: 'root' }))).toBeNull()
    expect(markOf(event('newRun', { kind: 'fork', parents: ['b'] }))?.text).toBe('fork of b')
    expect(marksOf([event('undo', {}), event('undo', {}, 'z')], [], ['a'])).toHaveLength(1)
  })
})

describe('the graph', () => {
  const node = (id: string): GraphNode => ({
    id,
    kind: 'fork',
    status: 'left',
    step: 1,
    created: 0,
    archived: null,
    generation: 0,
    subset: null,
  })
  const edge = (from: string, to: string): GraphEdge => ({
    from,
    to,
    kind: 'fork',
    hash: '',
    step: 1,
    changes: {},
    strategy: null,
  })
  const nodes = ['a', 'b', 'c', 'm'].map(node)
  const edges = [edge('a', 'b'), edge('a', 'c'), edge('b', 'm'), edge('c', 'm')]

  it('lays children to the right of their parents', () => {
    const found = new Map(place(nodes, edges).nodes.map((one) => [one.id, one]))
    expect(found.get('a')!.x).toBeLessThan(found.get('b')!.x)
    expect(found.get('b')!.x).toBeLessThan(found.get('m')!.x)
  })

  it('hides what is below a collapsed run, unless another way leads there', () => {
    expect([...visible(nodes, edges, new Set(['b']))]).toEqual(['a', 'b', 'c', 'm'])
    expect([...visible(nodes, edges, new Set(['b', 'c']))]).toEqual(['a', 'b', 'c'])
    expect([...visible(nodes, edges, new Set(['a']))]).toEqual(['a'])
    expect(descendants(edges, 'a').size).toBe(3)
  })

  it('is quick for two hundred runs', () => {
    const many = Array.from({ length: 200 }, (_, i) => node(`r${i}`))
    const links = many.slice(1).map((one, i) => edge(`r${Math.floor(i / 3)}`, one.id))
    const began = performance.now()
    expect(place(many, links).nodes).toHaveLength(200)
    const shown = visible(many, links, folded(many, links, 50))
    expect(shown.size).toBeGreaterThan(0)
    expect(shown.size).toBeLessThanOrEqual(50)
    expect(folded(many, links, 200).size).toBe(0)
    expect(performance.now() - began).toBeLessThan(5000)
  })
})

describe('a condition', () => {
  it('compares numbers, and tells texts that are equal', () => {
    const run: Record<string, unknown> = { lr: 0.004, kind: 'fork' }
    const holds = (text: string) => condition(text)!((name) => run[name])
    expect(['lr<0.01', 'lr>=0.004', 'lr=0.004', 'kind=fork'].map(holds)).toEqual([true, true, true, true])
    expect(['lr>0.01', 'kind=root', 'kind<3', 'unknown<3'].map(holds)).toEqual([false, false, false, false])
    expect(condition('fork*')).toBeNull()
  })
})

describe('options of merging', () => {
  const option = (more: object) => ({
    name: 'density',
    kind: 'number' as const,
    default: 0.2,
    help: '',
    low: 0,
    high: 1,
    open_low: true,
    ...more,
  })

  it('reads rows of data', () => {
    expect(readSlices('')).toEqual({})
    expect(readSlices(' hard one = top(loss, 20) \n\nclean=all() - suspects(seed=1)')).toEqual({
      'hard one': 'top(loss, 20)',
      clean: 'all() - suspects(seed=1)',
    })
    for (const bad of ['top(loss, 20)', '= top(loss, 20)', 'hard =', 'a = all()\nb', 'a = all()\na = hard(0.1)'])
      expect(readSlices(bad)).toBeNull()
  })

  it('what was typed is read within its bounds', () => {
    expect(readOption(option({}), '')).toBeNull()
    expect(readOption(option({}), ' 0.5 ')).toEqual({ value: 0.5 })
    expect(readOption(option({}), '0')).toEqual({ problem: 'above 0' })
    expect(readOption(option({}), '1.01')).toEqual({ problem: 'at most 1' })
    expect(readOption(option({}), 'much')).toEqual({ problem: 'a number' })
    expect(readOption(option({ kind: 'whole number', low: null, high: null }), '1.5')).toEqual({
      problem: 'a whole number',
    })
    expect(readOption(option({ kind: 'numbers', high: null }), '1, 2')).toEqual({ value: [1, 2] })
    expect(readOption(option({ kind: 'yes or no', low: null, high: null }), 'no')).toEqual({ value: false })
  })

  it('an option that several strategies have is one field, which says the default of each', () => {
    const strategy = (name: string, usual: number) => ({
      name,
      summary: '',
      needs: ['base'],
      options: [option({ name: 'scale', default: usual })],
      takes_weights: true,
      parents: null,
    })
    const found = sharedOptions([strategy('dare', 0.3), strategy('ties', 1)])
    expect(found.map(({ name, of, usual }) => [name, of, usual])).toEqual([
      ['scale', ['dare', 'ties'], 'dare 0.3; ties 1'],
    ])
    expect(misfit(strategy('ties', 1), 2, false, false)).toContain('base')
    expect(misfit(strategy('ties', 1), 2, false, true)).toBeNull()
    expect(misfit({ ...strategy('slerp', 1), needs: [], parents: 2 }, 3, false, true)).toBe('merges 2 parents')
  })
})

describe('reports', () => {
  const table = (drawn: string, unit: string, ...rows: (number | string | null)[][]) => ({
    title: 'Sizes',
    columns: [
      { name: 'layer', unit: '' },
      { name: 'size', unit },
      { name: 'to', unit },
    ],
    rows,
    drawn,
    left_out: 0,
  })

  it('draws a bar for each row, and none for what is no number', () => {
    expect(bars(table('log', '', ['a', 0.01], ['b', 1], ['c', 'NaN'], ['d', 0]))).toEqual([
      [0, 0.02],
      [0, 1],
      null,
      [0, 0],
    ])
    expect(bars(table('bars', 'share', ['a', 0.25], ['b', null]))).toEqual([[0, 0.25], null])
    expect(bars(table('bars', '', ['a', -4], ['b', 2]))).toEqual([
      [0, 1],
      [0, 0.5],
    ])
    expect(bars(table('range', '', ['a', -1, 1], ['b', 0, 3]))).toEqual([
      [0, 0.5],
      [0.25, 0.75],
    ])
    expect(bars(table('log', '', ['a', 'NaN']))).toEqual([null])
  })

  it('says numbers by their unit, and counts in words', () => {
    expect([
      cell(0.0412, 's'),
      cell(0.5, 'share'),
      cell(0.0001, 'share'),
      cell('Infinity', ''),
      cell(null, 's'),
    ]).toEqual(['41.2 ms', '50 %', '< 0.1 %', '∞', '–'])
    expect(verdict({ error: 1, warning: 2, note: 0 })).toBe('1 error, 2 warnings')
    expect(verdict({ error: 0, warning: 0, note: 0 })).toBe('nothing wrong')
    const finding = { report: 'health', severity: 'note', what: '', where: '', evidence: {}, advice: '' } as const
    expect(since({ ...finding, since: 5, before: true })).toBe('at or before step 5')
    expect(since({ ...finding, since: 1200, before: false })).toBe('since step 1 200')
  })
})

describe('an arrangement of charts', () => {
  const names = ['a', 'b', 'c', 'd']
  it('has pinned ones first, then those that were put somewhere, then the others', () => {
    expect(arranged(names, { pins: [], order: [] })).toEqual(names)
    expect(arranged(names, { pins: ['c'], order: ['d', 'gone', 'b'] })).toEqual(['c', 'd', 'b', 'a'])
  })
  it('puts one where another stands', () => {
    const forward = moved(names, { pins: [], order: [] }, 'a', 'c')
    expect(arranged(names, forward)).toEqual(['b', 'c', 'a', 'd'])
    expect(arranged(names, moved(names, forward, 'd', 'b'))).toEqual(['d', 'b', 'c', 'a'])
    expect(moved(names, forward, 'a', 'a')).toEqual(forward)
  })
  it('pins what is put among pinned ones, and no longer what is taken from there', () => {
    const pinned = moved(names, { pins: ['a'], order: [] }, 'd', 'a')
    expect(arranged(names, pinned)).toEqual(['d', 'a', 'b', 'c'])
    expect(pinned.pins).toEqual(['a', 'd'])
    expect(moved(names, pinned, 'a', 'c').pins).toEqual(['d'])
  })
  it('keeps keys within the group', () => {
    expect(aim(names, ['a', 'b'], 'b', 'ArrowRight')).toBeNull()
    expect(aim(names, ['a', 'b'], 'b', 'Home')).toBe('a')
    expect(aim(names, [], 'b', 'End')).toBe('d')
    expect(aim(names, [], 'b', 'x')).toBeNull()
  })
})
