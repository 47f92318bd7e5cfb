// Through which door a command came.

export const DOORS: Record<string, { title: string; by: string }> = {
  dashboard: { title: 'dashboard', by: 'in the dashboard' },
  cli: { title: 'command line', by: 'on the command line' },
  python: { title: 'Python', by: 'from Python' },
  api: { title: 'HTTP', by: 'over HTTP' },
}
