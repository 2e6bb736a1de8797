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

// GELU(x) = max(x, 0) + g(|x|) with g(a) = -a * erfc(a / sqrt(2)) / 2, which is nothing beyond 5.5. Up to there: 16 pieces, of each
// the polynomial in f = -1/2 ... 1/2 with the smallest largest error, the highest power first. All in all the error is below 3e-7
// or one rounding of the result; a rational function as good takes twice as long.
static constexpr float kGelu[5][16] = {
    {-8.61214125e-4f, -4.47063416e-4f, 9.70390029e-5f, 4.49508778e-4f, 4.89651400e-4f, 3.19987710e-4f, 1.16411109e-4f, -1.24891940e-5f,
     -5.49393117e-5f, -4.81690549e-5f, -2.84850194e-5f, -1.31340112e-5f, -4.96905295e-6f, -1.58114437e-6f, -4.29175088e-7f, -1.00270100e-7f},
    {-1.80120463e-3f, -4.51884745e-3f, -5.20180073e-3f, -4.00983496e-3f, -2.03556917e-3f, -3.77202959e-4f, 4.82469681e-4f, 6.58944540e-4f,
     5.00658178e-4f, 2.85231945e-4f, 1.31675144e-4f, 5.08967532e-5f, 1.67597864e-5f, 4.75065644e-6f, 1.16708782e-6f, 2.49677100e-7f},
    {4.57626358e-2f, 3.57858948e-2f, 2.05533616e-2f, 6.31547859e-3f, -2.79840361e-3f, -6.21312484e-3f, -5.81175974e-3f, -3.94648919e-3f,
     -2.15735263e-3f, -9.87148844e-4f, -3.85416613e-4f, -1.29815409e-4f, -3.79810954e-5f, -9.69782650e-6f, -2.16809917e-6f, -4.25438941e-7f},
    {-1.25196412e-1f, -4.22693379e-2f, 1.44080464e-2f, 4.06616069e-2f, 4.31728549e-2f, 3.33245359e-2f, 2.08723880e-2f, 1.10320225e-2f,
     5.01188776e-3f, 1.97688653e-3f, 6.81144476e-4f, 2.05821329e-4f, 5.46903684e-5f, 1.28038391e-5f, 2.64483219e-6f, 4.82563621e-7f},
    {-7.42100924e-2f, -1.56264365e-1f, -1.67635560e-1f, -1.37714475e-1f, -9.42769274e-2f, -5.54656647e-2f, -2.84418147e-2f, -1.28052933e-2f,
     -5.08305524e-3f, -1.78340299e-3f, -5.53923077e-4f, -1.52466571e-4f, -3.72159921e-5f, -8.05983655e-6f, -1.54922839e-6f, -2.64366861e-7f},
};

static inline floats gelu(floats x) {
  const floats magnitude = (floats)((ints)x & 0x7FFFFFFF);
  const floats u = smaller(multiply_add(magnitude, floats{} + 16 / 5.5f, floats{} - 0.5f), floats{} + 15.49f);
  const floats shifted = u + kRound, f = u - (shifted - kRound);
  floats y = lookup(kGelu[0], shifted);  // whose low bits are the number of the piece
  for (int i = 1; i < 5; ++i) y = multiply_add(y, f, lookup(kGelu[i], shifted));
  return larger(floats{}, x) + y;  // in this order: what is not a number stays so
}
