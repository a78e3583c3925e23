// The texts of the page, which it has in its language.
export function fill(text, ...values) {
  return values.reduce((result, value, index) => result.replace(`{${index}}`, value), text);
}
