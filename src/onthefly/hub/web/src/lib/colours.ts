// Eight colours that stay apart for colour-blind eyes (after Okabe and Ito), for light and for dark ground.

const LIGHT = ['#0072b2', '#d55e00', '#009e73', '#b1518f', '#2ba3dc', '#a86c00', '#6a51a3', '#4d4d4d']
const DARK = ['#4da3e0', '#ff8a3d', '#2fc796', '#e58cc0', '#7fd0ff', '#e6b030', '#a894e6', '#b9bec6']

const dark = window.matchMedia('(prefers-color-scheme: dark)')

export const theme = {
  isDark: () => dark.matches,
  onChange: (told: () => void) => dark.addEventListener('change', told),
}

/** A colour for a place in the order of runs. Beyond eight, the dash tells them apart: see `dashOf`. */
export function colourAt(place: number): string {
  const palette = dark.matches ? DARK : LIGHT
  return palette[((place % 8) + 8) % 8]
}

export function dashOf(place: number): number[] | undefined {
  return [undefined, [8, 3], [3, 3], [10, 3, 2, 3]][Math.floor(place / 8) % 4]
}

export function css(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}
