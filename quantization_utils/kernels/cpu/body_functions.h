// Part of body.h: functions of a vector of floats.

// Adding 1.5 * 2^23 rounds a float of magnitude < 2^22 to the nearest integer, ties to even, as rint does; the low bits of the
// sum are that integer, and larger sums have larger bits, taken as an integer (smaller than -1.5 * 2^23: negative ones).
static constexpr float kRound = 12582912.0f;
static constexpr int32_t kRoundBits = 0x4B400000;

// Horner's scheme, the highest power's coefficient first.
template <typename... Rest>
static inline floats polynomial(floats x, float highest, Rest... rest) {
  floats y = floats{} + highest;
  ((y = multiply_add(y, x, floats{} + rest)), ...);
  return y;
}

// 2^x for x in [-125, 0], 2^-125 below; relative error below 3e-7. x = n + f, a polynomial of degree 5 for 2^f, and n, the low bits
// of the rounded sum, added to the exponent's.
static inline floats power_of_two(floats x) {
  x = larger(x, floats{} - 125.0f);
  const floats shifted = x + kRound, f = x - (shifted - kRound);
  const floats y = polynomial(f, 1.327647174e-3f, 9.675541540e-3f, 5.550713276e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.000000072f);
  return (floats)((ints)y + ((ints)shifted << 23));
}

// x * (1 + erf(x / sqrt(2))) / 2, with erf(z) = z * P(z^2) / Q(z^2) fitted to |z| <= 3.9, where 1 - erf is below 4e-8: its error
// is below 5e-7 everywhere.
static inline floats gelu(floats x) {
  const floats z = smaller(larger(x * 0.70710678f, floats{} - 3.9f), floats{} + 3.9f);
  const floats t = z * z;
  const floats p = polynomial(t, -1.497414697e-6f, 2.633031481e-4f, 1.046049956e-2f, 7.329031436e-2f, 3.698464242e-1f, 1.128381515f);
  const floats q = polynomial(t, 2.454245028e-3f, 2.868578647e-2f, 1.853339642e-1f, 6.611085427e-1f, 1.0f);
  return x * 0.5f * multiply_add(z * p, reciprocal(q), floats{} + 1.0f);
}
