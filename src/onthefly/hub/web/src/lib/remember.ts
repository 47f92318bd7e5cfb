// What somebody chose on a page, kept in this browser.

export function remembered<T extends object>(name: string, usual: T): { value: T; keep: (value: T) => void } {
  let value = usual
  try {
    const found: unknown = JSON.parse(localStorage.getItem(name) ?? 'null')
    if (found && typeof found === 'object') value = { ...usual, ...found }
  } catch {
    // as usual, then
  }
  return {
    value,
    keep(next) {
      try {
        localStorage.setItem(name, JSON.stringify(next))
      } catch {
        // it is not kept
      }
    },
  }
}
