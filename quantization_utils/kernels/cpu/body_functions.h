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
// of the rounded sum, added to the exponent's (unsigned: beside what is not a number, x may be above 0 and the sum overflow).
static inline floats power_of_two(floats x) {
  x = larger(floats{} - 125.0f, x);  // in this order: what is not a number stays so
  const floats shifted = x + kRound, f = x - (shifted - kRound);
  const floats y = polynomial(f, 1.327647174e-3f, 9.675541540e-3f, 5.550713276e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.000000072f);
  return (floats)((unsigned_ints)y + ((unsigned_ints)shifted << 23));
}

// GELU(x) = max(x, 0) + a * h(a) with a = |x| and h(a) = -erfc(a / sqrt(2)) / 2, which is nothing beyond 5.5. Up to there: 16 pieces,
// of each the polynomial in f = -1/2 ... 1/2 through h at Chebyshev's points, the highest power first. All in all the error is that of
// rounding the result once, a quarter more on average: an error of 1e-7 would be seen in the quantized activations that come next.
static constexpr float kGelu[6][16] = {
    {4.41688062e-5f, 2.05529177e-5f, -9.64846549e-6f, -2.76001356e-5f, -2.70576547e-5f, -1.51476161e-5f, -2.72419379e-6f, 4.14485294e-6f,
     5.48547087e-6f, 4.06555455e-6f, 2.24310133e-6f, 9.95399319e-7f, 3.67444443e-7f, 1.14903294e-7f, 3.07796206e-8f, 7.11560322e-9f},
    {1.15908944e-4f, 2.84563546e-4f, 3.10142292e-4f, 2.09701277e-4f, 6.64036197e-5f, -4.13423113e-5f, -8.45062386e-5f, -7.83916985e-5f,
     -5.26082367e-5f, -2.81981484e-5f, -1.25562156e-5f, -4.73935370e-6f, -1.53451629e-6f, -4.29502592e-7f, -1.04476150e-7f, -2.21719283e-8f},
    {-2.58253259e-3f, -1.73590623e-3f, -4.88155056e-4f, 5.86076640e-4f, 1.13706198e-3f, 1.16409606e-3f, 8.88452458e-4f, 5.49501507e-4f,
     2.85001064e-4f, 1.26163475e-4f, 4.81676834e-5f, 1.59672709e-5f, 4.61701529e-6f, 1.16839021e-6f, 2.59408552e-7f, 5.06260882e-8f},
    {-3.99167137e-3f, -1.06404349e-2f, -1.40015027e-2f, -1.37515590e-2f, -1.10211736e-2f, -7.46089313e-3f, -4.33945004e-3f, -2.18955078e-3f,
     -9.64190636e-4f, -3.72043753e-4f, -1.26142229e-4f, -3.76566932e-5f, -9.91282832e-6f, -2.30373257e-6f, -4.73087937e-7f, -8.59098463e-8f},
    {1.35125726e-1f, 1.20065995e-1f, 9.47946906e-2f, 6.65012822e-2f, 4.14531976e-2f, 2.29597948e-2f, 1.12995207e-2f, 4.94121807e-3f,
     1.91995036e-3f, 6.62869483e-4f, 2.03351796e-4f, 5.54306607e-5f, 1.34256134e-5f, 2.88935075e-6f, 5.52520646e-7f, 9.38812406e-8f},
    {-4.31767911e-1f, -3.03058177e-1f, -1.95066825e-1f, -1.14463978e-1f, -6.09466955e-2f, -2.93372087e-2f, -1.27292043e-2f, -4.96690255e-3f,
     -1.73965574e-3f, -5.46114112e-4f, -1.53467947e-4f, -3.85686290e-5f, -8.66117261e-6f, -1.73679643e-6f, -3.10815551e-7f, -4.96167978e-8f},
};

static inline floats gelu(floats x) {
  const floats magnitude = smaller((floats)((ints)x & 0x7FFFFFFF), floats{} + 5.4966f);  // within the last piece
  const floats u = multiply_add(magnitude, floats{} + 16 / 5.5f, floats{} - 0.5f), shifted = u + kRound, f = u - (shifted - kRound);
  floats y = lookup(kGelu[0], shifted);  // whose low bits are the number of the piece
  for (int i = 1; i < 6; ++i) y = multiply_add(y, f, lookup(kGelu[i], shifted));
  return multiply_add(magnitude, y, larger(floats{}, x));  // in this order: what is not a number stays so
}
