import { describe, expect, it } from 'vitest'
import type { Point } from '../src/lib/maths'
import { among, binsOf, counted, dotted, inkOf, insideOf, maskOf, orderOf, placed, spot } from '../src/lib/selecting'

/** Whether a point lies in a polygon (even-odd). */
function inside(x: number, y: number, polygon: Point[]): boolean {
  let found = false
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [xi, yi] = polygon[i]
    const [xj, yj] = polygon[j]
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) found = !found
  }
  return found
}

describe('what is drawn around', () => {
  it('is what lies in the polygon, also a twisted one', () => {
    let seed = 7
    const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647
    for (let round = 0; round < 20; round++) {
      const polygon = Array.from({ length: 3 + round * 5 }, (): Point => [random() * 10 - 5, random() * 3])
      const test = insideOf(polygon)
      for (let i = 0; i < 500; i++) {
        const [x, y] = [random() * 12 - 6, random() * 4 - 0.5]
        expect(test(x, y)).toBe(inside(x, y, polygon))
      }
    }
  })

  it('is nothing for a line, and for what is no number', () => {
    const flat = insideOf([
      [0, 1],
      [5, 1],
      [2, 1],
    ])
    expect(flat(1, 1)).toBe(false)
    const box = insideOf([
      [0, 0],
      [1, 0],
      [1, 1],
      [0, 1],
    ])
    expect([box(0.5, 0.5), box(NaN, 0.5), box(0.5, NaN), box(2, 0.5)]).toEqual([true, false, false, false])
  })
})

describe('bins', () => {
  it('hold each finite value once, of all or of some', () => {
    const places = binsOf([0, 0.1, 5, 10, NaN, 99, -3], 0, 10, 10)
    expect([...places]).toEqual([0, 0, 5, 9, -1, 9, 0])
    expect([...counted(places, 10, null)]).toEqual([3, 0, 0, 0, 0, 1, 0, 0, 0, 2])
    expect([...counted(places, 10, maskOf([0, 2, 4, 50], 7))]).toEqual([1, 0, 0, 0, 0, 1, 0, 0, 0, 0])
  })
})

describe('order', () => {
  it('puts what is no number last, and keeps equal ones in their order', () => {
    const values = [2, NaN, 3, 2, NaN, -1]
    expect([...orderOf(values, true)]).toEqual([2, 0, 3, 5, 1, 4])
    expect([...orderOf(values, false)]).toEqual([5, 0, 3, 2, 1, 4])
    expect(among(orderOf(values, true), maskOf([1, 5, 2], 6))).toEqual([2, 5, 1])
  })
})

describe('points', () => {
  it('are where they belong, and denser where there are many', () => {
    const axis = { scale: 1, shift: 0 }
    const places = placed([1, 1, 9, NaN], [2, 2, 2, 0], axis, axis, 4, 4)
    expect([...places]).toEqual([9, 9, -1, -1])
    const picture = new Uint32Array(16)
    dotted(picture, places, spot(0.5, 4), null, Uint32Array.from([0xff, 0xaa, 0, 0]), 0.25)
    expect(picture[9]).toBe(((128 << 24) | 0xaa) >>> 0)
    expect(picture.filter(Boolean).length).toBe(1)
    expect(inkOf('#0072b2')).toBe(0xb27200)
  })
})
